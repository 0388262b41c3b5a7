// Chooses the instruction set once; NTKFAST_ISA forces one (v2, v3, v4 on x86-64, baseline elsewhere).
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "conv.h"

namespace ntk {

#ifdef NTK_X86
namespace v2 { extern const Kernels table; extern const Products products; extern const ConvKernels conv; }
namespace v3 { extern const Kernels table; extern const Products products; extern const ConvKernels conv; }
namespace v4 { extern const Kernels table; extern const Products products; extern const ConvKernels conv; }

const Kernels* kernels_of(const char* isa) {
    __builtin_cpu_init();
    if (!std::strcmp(isa, "v4")) return __builtin_cpu_supports("x86-64-v4") ? &v4::table : nullptr;
    if (!std::strcmp(isa, "v3")) return __builtin_cpu_supports("x86-64-v3") ? &v3::table : nullptr;
    if (!std::strcmp(isa, "v2")) return __builtin_cpu_supports("x86-64-v2") ? &v2::table : nullptr;
    return nullptr;
}
static const char* const kIsas[] = {"v4", "v3", "v2"};
#else
namespace baseline { extern const Kernels table; extern const Products products; extern const ConvKernels conv; }

const Kernels* kernels_of(const char* isa) { return !std::strcmp(isa, "baseline") ? &baseline::table : nullptr; }
static const char* const kIsas[] = {"baseline"};
#endif

const Products* products_of(const char* isa) {
    const Kernels* k = kernels_of(isa);
#ifdef NTK_X86
    return !k ? nullptr : k == &v4::table ? &v4::products : k == &v3::table ? &v3::products : &v2::products;
#else
    return k ? &baseline::products : nullptr;
#endif
}

const ConvKernels* conv_kernels_of(const char* isa) {
    const Kernels* k = kernels_of(isa);
#ifdef NTK_X86
    return !k ? nullptr : k == &v4::table ? &v4::conv : k == &v3::table ? &v3::conv : &v2::conv;
#else
    return k ? &baseline::conv : nullptr;
#endif
}

static const Kernels& choose() {
    if (const char* forced = std::getenv("NTKFAST_ISA"); forced && *forced) {
        if (const Kernels* k = kernels_of(forced)) return *k;
        std::string legal;
        for (const char* isa : kIsas)
            if (kernels_of(isa)) legal += (legal.empty() ? "" : ", ") + std::string(isa);
        throw std::runtime_error("NTKFAST_ISA=" + std::string(forced) +
                                 " is not available here; this build and processor have " + legal);
    }
    for (const char* isa : kIsas)
        if (const Kernels* k = kernels_of(isa)) return *k;
    throw std::runtime_error("ntkfast needs a processor with x86-64-v2 (SSE4.2)");
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace ntk
