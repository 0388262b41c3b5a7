// What the simulator tells the sanitizers of GCC: which stack runs, which threads have met. Nothing in a plain build.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_java_init(unsigned long, unsigned long);
void __tsan_java_alloc(unsigned long, unsigned long);
}
// The simulator's own state is not memory of the kernel: its accesses are no races.
#define SIM_UNSEEN __attribute__((noinline, no_sanitize("thread")))
#else
#define SIM_UNSEEN
#endif

namespace sim {

#if defined(__SANITIZE_THREAD__)
// Every fiber is a thread to the sanitizer. Switches order nothing; barriers do, through the address of a tag.
using Context = void*;
inline Context make_context() { return __tsan_create_fiber(0); }
inline Context this_context() { return __tsan_get_current_fiber(); }
inline void drop_context(Context c) {
    if (c) __tsan_destroy_fiber(c);
}
inline void leave(char* tag) { __tsan_release(tag); }
inline void join(char* tag) { __tsan_acquire(tag); }
// New memory at an old place: who used it before is forgotten. Only the interface for Java has this.
inline void forget(void* p, std::size_t n) {
    static const bool ready [[maybe_unused]] = (__tsan_java_init(8, 1ul << 46), true);
    const auto from = reinterpret_cast<unsigned long>(p) & ~7ul;
    __tsan_java_alloc(from, (reinterpret_cast<unsigned long>(p) + n - from + 7) & ~7ul);
}
struct Quiet {
    Quiet() {
        AnnotateIgnoreReadsBegin("", 0);
        AnnotateIgnoreWritesBegin("", 0);
    }
    ~Quiet() {
        AnnotateIgnoreWritesEnd("", 0);
        AnnotateIgnoreReadsEnd("", 0);
    }
};
#else
using Context = void*;
inline Context make_context() { return nullptr; }
inline Context this_context() { return nullptr; }
inline void drop_context(Context) {}
inline void leave(char*) {}
inline void join(char*) {}
inline void forget(void*, std::size_t) {}
struct Quiet {
    ~Quiet() {}  // or "unused variable"
};
#endif

// Stacks: `fake` keeps the address sanitizer's own stack of the fiber that is left.
struct Stack {
    const void* low = nullptr;
    std::size_t bytes = 0;
};
// Always inline: the sanitizer would count the call for one thread and its end for another.
__attribute__((always_inline)) inline void before_switch([[maybe_unused]] void** fake, [[maybe_unused]] Stack to, [[maybe_unused]] Context context) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, to.low, to.bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(context, __tsan_switch_to_fiber_no_sync);
#endif
}
// Called on the stack that was switched to; `from` learns the one that was left.
inline void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] Stack* from) {
#if defined(__SANITIZE_ADDRESS__)
    if (from)
        __sanitizer_finish_switch_fiber(fake, &from->low, &from->bytes);
    else
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void forbid([[maybe_unused]] void* p, [[maybe_unused]] std::size_t n) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(p, n);
#endif
}
inline void allow([[maybe_unused]] void* p, [[maybe_unused]] std::size_t n) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(p, n);
#endif
}

}  // namespace sim
