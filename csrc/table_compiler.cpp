// Nodes from the recursion -> a fine Chebyshev surrogate -> the fewest panels of the table's degree -> the table, verified.
#include "table_compiler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

namespace ntk {
namespace {

// Extended where the platform has it: rounding between the nodes and the table would cost a few 1e-15 of max |f|.
using Long = long double;
using Series = std::vector<Long>;  // coefficients of Chebyshev polynomials

const Long kPi = 3.14159265358979323846264338327950288L;
// Accuracy at which a table is taken at once, and the worst that is taken at all (else the recursion runs). The tests ask
// for 2e-14 and 1e-6.
template <class T>
constexpr double kWanted = sizeof(T) == 8 ? 4e-15 : 4e-7;
template <class T>
constexpr double kEnough = sizeof(T) == 8 ? 1.2e-14 : 8e-7;
// Errors are relative to |f|, but not below this part of max |f|: the kernel may cross 0.
const double kFloor = 0.1;

// Values of the network at y = sqrt(1 - |rho|), all (n,). side: 0 for rho >= 0, 1 for rho < 0.
class Network {
   public:
    Network(const Plan& plan, const TableTask& task) : plan_(plan), task_(task) {}
    std::vector<double> operator()(const std::vector<double>& x, int side) const {
        const std::int64_t n = std::int64_t(x.size());
        const std::vector<double> s(x.size(), side ? -1.0 : 1.0), norm(x.size(), task_.norm);
        std::vector<double> out(x.size());
        const Pairs pairs{n, x.data(), s.data(), norm.data(), norm.data(), out.data(),
                          task_.theta, task_.cov, task_.mean, task_.last};
        if (!kernels().nodes(plan_, pairs)) throw std::bad_alloc();
        return out;
    }

   private:
    const Plan& plan_;
    const TableTask& task_;
};

double chebyshev_point(int k, int n) { return std::cos(kPi * (k + 0.5) / n); }

// cos(pi j (k + 1/2) / n), (n, n): from values at the Chebyshev points to coefficients.
std::vector<Long> cosines(int n) {
    std::vector<Long> c(std::size_t(n) * n);
    for (int j = 0; j < n; ++j)
        for (int k = 0; k < n; ++k) c[std::size_t(j) * n + k] = std::cos(kPi * (j * (2 * k + 1) % (4 * n)) / (2 * n));
    return c;
}

template <class V>
Series series_of(const V* values, int n, const std::vector<Long>& c) {
    Series s(n);
    for (int j = 0; j < n; ++j) {
        Long sum = 0;
        for (int k = 0; k < n; ++k) sum += values[k] * c[std::size_t(j) * n + k];
        s[j] = sum * (j ? 2 : 1) / n;
    }
    return s;
}

// Clenshaw's sum at t in [-1, 1]
Long evaluate(const Long* s, int n, Long t) {
    Long b1 = 0, b2 = 0;
    for (int j = n - 1; j > 0; --j) {
        const Long b = 2 * t * b1 - b2 + s[j];
        b2 = b1, b1 = b;
    }
    return t * b1 - b2 + s[0];
}

// f on [0, 1] by 24 points an octave: for singularities to the left of 0 each octave converges like 5.8^-k, so 24 points
// leave 1e-18. Below 2^-26 the kernel is linear in y to rounding.
class Surrogate {
   public:
    static constexpr int kPoints = 24, kOctaves = 27;

    Surrogate(const Network& network, int side) : cosines_(cosines(kPoints)) {
        std::vector<double> x;
        for (int o = 0; o < kOctaves; ++o)
            for (int k = 0; k < kPoints; ++k) {
                const Long y = left(o) + (right(o) - left(o)) * (1 + chebyshev_point(k, kPoints)) / 2;
                x.push_back(double(y * y));
            }
        const std::vector<double> f = network(x, side);
        for (int o = 0; o < kOctaves; ++o) {
            const Series s = series_of(f.data() + o * kPoints, kPoints, cosines_);
            std::copy(s.begin(), s.end(), series_[o].begin());
        }
        for (double v : f) {
            finite_ = finite_ && std::isfinite(v);
            largest_ = std::max(largest_, std::fabs(v));
        }
    }
    Long operator()(Long y) const {
        int o = y > 0 ? -std::ilogb(y) - 1 : kOctaves - 1;
        o = std::min(std::max(o, 0), kOctaves - 1);
        const Long t = 2 * (y - left(o)) / (right(o) - left(o)) - 1;
        return evaluate(series_[o].data(), kPoints, std::min(std::max(t, Long(-1)), Long(1)));
    }
    double largest() const { return largest_; }
    bool finite() const { return finite_; }

   private:
    static double right(int o) { return std::ldexp(1.0, -o); }
    static double left(int o) { return o == kOctaves - 1 ? 0.0 : std::ldexp(1.0, -o - 1); }
    std::vector<Long> cosines_;
    std::array<std::array<Long, kPoints>, kOctaves> series_;
    double largest_ = 0.0;
    bool finite_ = true;
};

// How y is cut into bins: 2^parts bins in every octave of y + 2^-octaves. Finer near y = 0 for the deeper networks.
struct Bins {
    int octaves, parts;
};
const Bins kBins[] = {{7, 3}, {15, 2}, {31, 1}};

template <class T>
constexpr int kMantissa = sizeof(T) == 8 ? 52 : 23;

template <class T>
T value_of_bits(long long b) {
    T x;
    if (sizeof(T) == 8) {
        std::memcpy(&x, &b, sizeof x);
    } else {
        const int low = int(b);
        std::memcpy(&x, &low, sizeof x);
    }
    return x;
}

// Edges of the bins in y, from 0 to 1.
template <class T>
std::vector<double> edges_of(const Bins& bins) {
    const int shift = kMantissa<T> - bins.parts;
    const T delta = T(std::ldexp(1.0, -bins.octaves));
    const long long base = bits(delta) >> shift, count = (bits(T(1) + delta) >> shift) - base + 1;
    std::vector<double> edges;
    for (long long k = 0; k < count; ++k) edges.push_back(double(value_of_bits<T>((base + k) << shift)) - double(delta));
    edges.push_back(1.0);
    return edges;
}

struct Panel {
    int side, first, last;  // bins
};

// Fits of one degree on unions of bins. Errors are remembered.
class Fits {
   public:
    Fits(const std::array<Surrogate, 2>& f, std::vector<double> edges, int terms, double epsilon)
        : f_(f), edges_(std::move(edges)), terms_(terms), epsilon_(epsilon), values_(terms), cosines_(cosines(terms)),
          errors_(2 * edges_.size() * edges_.size(), -1.0), floor_(kFloor * std::max(f[0].largest(), f[1].largest())) {}

    int bins() const { return int(edges_.size()) - 1; }
    double edge(int k) const { return edges_[k]; }

    Series fit(const Panel& p) {
        for (int k = 0; k < terms_; ++k) values_[k] = f_[p.side](at(p, chebyshev_point(k, terms_)));
        return series_of(values_.data(), terms_, cosines_);
    }
    // Panels of the least number such that every one is as good as `tolerance`; more than `most` are not counted.
    std::vector<Panel> panels(double tolerance, int most) {
        std::vector<Panel> found;
        for (int side = 0; side < 2; ++side)
            for (int first = 0; first < bins(); first = found.back().last) {
                int low = first + 1, high = bins();
                if (error({side, first, high}) <= tolerance) low = high;
                while (high - low > 1) {
                    const int middle = (low + high) / 2;
                    (error({side, first, middle}) <= tolerance ? low : high) = middle;
                }
                found.push_back({side, first, low});
                if (int(found.size()) > most) return found;
            }
        return found;
    }

   private:
    Long at(const Panel& p, Long t) const {
        return (edges_[p.first] + edges_[p.last]) * Long(0.5) + (edges_[p.last] - edges_[p.first]) * t / 2;
    }
    // Largest error of the fit between its points, and what rounding in the arithmetic of the table adds: it is relative
    // to the largest |f| of the panel, not to |f|. A single bin counts as well: it cannot be made smaller.
    double error(const Panel& p) {
        double& known = errors_[(p.side * edges_.size() + p.first) * edges_.size() + p.last];
        if (known >= 0.0) return known;
        const Series s = fit(p);
        const int points = 2 * terms_ + 1;
        known = 0.0;
        double rounding = 0.0;
        for (int k = 0; k < terms_; ++k) rounding = std::max(rounding, double(std::fabs(values_[k])));
        rounding *= epsilon_;
        for (int k = 0; k < points; ++k) {
            const Long t = -std::cos(kPi * k / (points - 1));
            const Long f = f_[p.side](at(p, t));
            const double gap = double(std::fabs(evaluate(s.data(), terms_, t) - f));
            known = std::max(known, (gap + rounding) / std::max({double(std::fabs(f)), floor_, std::numeric_limits<double>::min()}));
        }
        return known;
    }
    const std::array<Surrogate, 2>& f_;
    std::vector<double> edges_;
    int terms_;
    double epsilon_;
    Series values_;  // of the last fit
    std::vector<Long> cosines_;
    std::vector<double> errors_;
    double floor_;
};

// Coefficients in h of sum_j s_j T_j((h - moved) / half).
Series powers(const Series& s, Long half, Long moved) {
    const int n = int(s.size());
    Series before(n, 0), now(n, 0), c(n, 0);
    before[0] = 1, now[1] = 1;
    for (int j = 0; j < n; ++j) {
        const Series& t = j == 0 ? before : now;
        for (int k = 0; k < n; ++k) c[k] += s[j] * t[k];
        if (j == 0) continue;
        Series next(n);
        for (int k = 0; k < n; ++k) next[k] = (k ? 2 * now[k - 1] : 0) - before[k];
        before = now, now = next;
    }
    Long scale = 1;
    for (int k = 0; k < n; ++k, scale /= half) c[k] *= scale;
    for (int k = 0; moved != 0 && k < n; ++k)  // Horner's shift
        for (int m = n - 2; m >= k; --m) c[m] -= moved * c[m + 1];
    return c;
}

template <class T>
void fill(Table<T>& table, const Bins& bins, int terms, Fits& fits, const std::vector<Panel>& panels) {
    std::memset(static_cast<void*>(&table), 0, sizeof table);
    table.delta = T(std::ldexp(1.0, -bins.octaves));
    table.shift = kMantissa<T> - bins.parts;
    table.terms = terms;
    for (int p = 0; p < int(panels.size()); ++p) {
        const Panel& panel = panels[p];
        const double left = fits.edge(panel.first), right = fits.edge(panel.last);
        // The centre is rounded, the polynomial is made around the rounded one.
        const Long middle = (Long(left) + right) / 2;
        table.centre[p] = T(middle);
        const Series c = powers(fits.fit(panel), (Long(right) - left) / 2, middle - table.centre[p]);
        for (int k = 0; k < terms; ++k) table.c[k][p] = table.row[p][k] = T(c[k]);
        const long long base = bits(table.delta) >> table.shift;
        const int end = panel.last == fits.bins() ? kTableBins : panel.last;  // y just above 1 stays in the last panel
        for (int k = panel.first; k < end; ++k)
            table.panel[int((base + k) ^ (panel.side ? kTableBins : 0)) & (2 * kTableBins - 1)] = (unsigned char)(p);
    }
}

void table_values(const Table<double>& t, std::int64_t n, const double* x, const double* s, double* out) {
    kernels().table64(t, n, x, s, out);
}
void table_values(const Table<float>& t, std::int64_t n, const float* x, const float* s, float* out) {
    kernels().table32(t, n, x, s, out);
}

// Largest error against the network at points between the nodes, by the kernel that will run.
template <class T>
double verify(const Network& network, const Table<T>& table, const Fits& fits, const std::vector<Panel>& panels,
              double largest) {
    double worst = 0.0;
    for (int side = 0; side < 2; ++side) {
        std::vector<double> x = {0.0, 1.0};
        for (int k = 1; k <= 40; ++k) x.push_back(double(T(std::ldexp(0.7, -k))));
        for (const Panel& panel : panels) {
            if (panel.side != side) continue;
            const double left = fits.edge(panel.first), right = fits.edge(panel.last);
            const int points = 47;  // no multiple of the nodes
            for (int k = 0; k < points; ++k) {
                const double y = left + (right - left) * (0.5 - 0.5 * std::cos(double(kPi) * (k + 0.37) / points));
                x.push_back(double(T(y * y)));
            }
        }
        const std::vector<double> f = network(x, side);
        const std::vector<T> t(x.begin(), x.end()), s(x.size(), side ? T(-1) : T(1));
        std::vector<T> made(x.size());
        table_values(table, std::int64_t(x.size()), t.data(), s.data(), made.data());
        for (std::size_t k = 0; k < x.size(); ++k) {
            const double gap = std::fabs(double(made[k]) - f[k]);
            const double unit = std::max({std::fabs(f[k]), kFloor * largest, std::numeric_limits<double>::min()});
            if (!(gap / unit <= worst)) worst = gap / unit;  // NaN comes through
            if (std::isnan(worst)) return worst;
        }
    }
    return worst;
}

// The fewest errors on at most `most` panels: bisection of the tolerance in factors of 1.4.
std::vector<Panel> best_panels(Fits& fits, int most, double low, double high) {
    std::vector<Panel> best = fits.panels(high, most);
    if (int(best.size()) > most) return {};
    while (high > 1.4 * low) {
        const double middle = std::sqrt(low * high);
        std::vector<Panel> found = fits.panels(middle, most);
        if (int(found.size()) <= most) best = found, high = middle;
        else low = middle;
    }
    return best;
}

}  // namespace

template <class T>
TableReport compile_table(const Plan& plan, const TableTask& task, Table<T>& table) {
    using Shape = typename Table<T>::Shape;
    const Network network(plan, task);
    const std::array<Surrogate, 2> f{Surrogate(network, 0), Surrogate(network, 1)};
    TableReport best{std::numeric_limits<double>::infinity(), false, 0};
    const double largest = std::max(f[0].largest(), f[1].largest());
    if (!f[0].finite() || !f[1].finite() || !(largest <= double(std::numeric_limits<T>::max()))) return best;
    for (const Bins& bins : kBins)
        for (int terms : {Shape::few, Shape::terms}) {
            Fits fits(f, edges_of<T>(bins), terms, double(std::numeric_limits<T>::epsilon()));
            const std::vector<Panel> panels = best_panels(fits, Shape::panels, 0.02 * kWanted<T>, kEnough<T>);
            if (panels.empty()) continue;
            Table<T> made;
            fill(made, bins, terms, fits, panels);
            const double error = verify(network, made, fits, panels, largest);
            if (error < best.error) {
                best = {error, error <= kEnough<T>, int(panels.size())};
                table = made;
            }
            if (best.error <= kWanted<T>) return best;
        }
    return best;
}

template TableReport compile_table<double>(const Plan&, const TableTask&, Table<double>&);
template TableReport compile_table<float>(const Plan&, const TableTask&, Table<float>&);

}  // namespace ntk
