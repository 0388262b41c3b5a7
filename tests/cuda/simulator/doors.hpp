// Launching any kernel from outside: arguments as an array of pointers, one per parameter, as cuLaunchKernel takes them.
// simulate.py writes a file that includes words.hpp, the .cu file and this one, with a SIM_KERNEL line for each kernel.
#pragma once

#include <array>
#include <utility>

#include "machine.hpp"

namespace sim {

// p for pointers, i and f with their size for numbers, s with its size for structures
template <class T>
std::string kind() {
    const std::string bytes = std::to_string(sizeof(T));
    if constexpr (std::is_pointer_v<T>) return "p";
    else if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) return "i" + bytes;
    else if constexpr (std::is_floating_point_v<T>) return "f" + bytes;
    else return "s" + bytes;
}

template <auto function>
struct Entry;
template <class... A, void (*function)(A...)>
struct Entry<function> {
    template <std::size_t... k>
    static void unpack([[maybe_unused]] void** args, std::index_sequence<k...>) {
        function(*static_cast<std::remove_cvref_t<A>*>(args[k])...);
    }
    static void call(void** args) { unpack(args, std::index_sequence_for<A...>()); }
    static std::string signature() {
        std::string all;
        ((all += kind<std::remove_cvref_t<A>>() + " "), ...);
        return all;
    }
};

struct Kernel {
    const char* name;
    unsigned most_threads;  // of __launch_bounds__
    void (*call)(void**);
    std::string signature;
};

inline std::string last_error;

inline const Kernel* find(const std::vector<Kernel>& kernels, const char* name) {
    for (const auto& k : kernels)
        if (!std::strcmp(k.name, name)) return &k;
    return nullptr;
}

inline int run(const std::vector<Kernel>& kernels, const char* name, const Launch& l, void** args) {
    try {
        const Kernel* k = find(kernels, name);
        if (!k) throw std::invalid_argument("no such kernel");
        if (k->most_threads && l.block.x * l.block.y * l.block.z > k->most_threads)
            throw std::invalid_argument("block beyond the kernel's __launch_bounds__");
        launch(l, [&] { k->call(args); });
        return 0;
    } catch (const std::exception& e) {
        last_error = e.what();
        return 1;
    }
}

}  // namespace sim

#define SIM_KERNEL(name, ...) {#name, unsigned((0, ##__VA_ARGS__)), &sim::Entry<&name>::call, sim::Entry<&name>::signature()},

#define SIM_DOOR extern "C" __attribute__((visibility("default")))
#define SIM_DOORS(kernels, ...)                                                                                \
    SIM_DOOR const char* sim_error() { return sim::last_error.c_str(); }                                      \
    SIM_DOOR const char* sim_signature(const char* name) {                                                    \
        const auto* k = sim::find(kernels, name);                                                              \
        return k ? k->signature.c_str() : nullptr;                                                             \
    }                                                                                                          \
    SIM_DOOR int sim_launch(const char* name, const unsigned* grid, const unsigned* block, std::size_t shared, \
                            unsigned seed, void** args) {                                                      \
        return sim::run(kernels, name,                                                                         \
                        {{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, seed, {__VA_ARGS__}}, args); \
    }
