// One CUDA block at a time, each CUDA thread a fiber that runs until it waits: a barrier, a warp operation, its end.
//
// Everything is decided by the seed: threads run in order for seed 0 and in a new random order after every wait for
// others. Shared memory is NaN before each block. What CUDA leaves undefined is an error here, with the line:
//   threads of a block at different barriers, or some of them returned;
//   lanes of a mask at different warp operations, or some of them never there;
//   a lane outside of its own mask, or reading from a lane outside of it.
#pragma once

#include <link.h>
#include <pthread.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "sanitizers.hpp"

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct uint3 {
    unsigned x = 0, y = 0, z = 0;
};

namespace sim {

using Where = std::source_location;
constexpr unsigned kWarp = 32;
constexpr std::size_t kPage = 4096, kStackBytes = 1 << 17, kFiberBytes = kPage + kStackBytes;
// Dynamic shared memory: sm_90 allows 227 KiB per block. 48 KiB without cudaFuncAttributeMaxDynamicSharedMemorySize.
constexpr std::size_t kMaxShared = 227 * 1024;

enum class State : unsigned char { ready, at_barrier, in_warp, done };

struct Fiber {
    ucontext_t context{};
    jmp_buf jump{};
    bool started = false;
    char* map = nullptr;  // a page that must not be touched, then the stack
    void* fake = nullptr;
    Context tsan = nullptr;
    uint3 index{};  // threadIdx
    unsigned linear = 0, barriers = 0, mask = 0;
    State state = State::done;
    const char* operation = "";
    Where where;
    Stack stack() const { return {map + kPage, kStackBytes}; }
};

// The lanes of one mask of a warp. Lanes may have met others in between, so parities are counted per mask.
struct Group {
    unsigned warp, mask, turns;  // turns: one bit per lane
    // Two of each: a lane that is early for the next operation must not touch what a late one still reads.
    char tag[2];
    alignas(16) unsigned char slot[2][kWarp][16];
};

// Where the threads of one block meet. Made anew for each, or blocks would seem to wait for each other.
struct Meetings {
    char barrier[2];
    bool vote[2];  // of __syncthreads_or
    std::deque<Group> groups;  // references stay valid
};

struct Machine {
    dim3 grid, block;
    uint3 index{};  // of the block
    std::vector<std::unique_ptr<Fiber>> fibers;
    char* stacks = nullptr;  // of all fibers
    std::vector<Fiber*> thread;  // of the block, in order
    std::unique_ptr<Meetings> meetings;
    Fiber* self = nullptr;
    ucontext_t home{};
    jmp_buf home_jump{};
    Stack home_stack;
    void* home_fake = nullptr;
    Context home_tsan = nullptr;
    pthread_t owner{};
    const std::function<void()>* body = nullptr;
    std::exception_ptr error;
    char end = 0;  // tag of the end of the launch
};
inline Machine machine;

[[noreturn]] inline void fail(const std::string& what, const Fiber& f) {
    const auto& m = machine;
    const char* file = f.where.file_name();
    const char* slash = std::strrchr(file, '/');
    char text[256];
    std::snprintf(text, sizeof text, " at %s:%u, block (%u,%u,%u) thread (%u,%u,%u)", slash ? slash + 1 : file,
                  unsigned(f.where.line()), m.index.x, m.index.y, m.index.z, f.index.x, f.index.y, f.index.z);
    throw std::runtime_error(what + text);
}

// Switching. Without sanitizers a jump is ten times faster than swapcontext, which asks the kernel for signal masks.
SIM_UNSEEN inline void switch_to_fiber(Fiber& f) {
    auto& m = machine;
    m.self = &f;
    before_switch(&m.home_fake, f.stack(), f.tsan);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    swapcontext(&m.home, &f.context);
#else
    if (!_setjmp(m.home_jump)) {
        if (f.started) _longjmp(f.jump, 1);
        f.started = true;
        setcontext(&f.context);
    }
#endif
    after_switch(m.home_fake, nullptr);
}
SIM_UNSEEN inline void switch_to_home() {
    auto& m = machine;
    Fiber& f = *m.self;
    before_switch(&f.fake, m.home_stack, m.home_tsan);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    swapcontext(&f.context, &m.home);
#else
    if (!_setjmp(f.jump)) _longjmp(m.home_jump, 1);
#endif
    after_switch(f.fake, &m.home_stack);
}

// A fiber lives on from block to block and from launch to launch.
inline void fiber_main() {
    auto& m = machine;
    after_switch(nullptr, &m.home_stack);
    for (;;) {
        try {
            (*m.body)();
        } catch (...) {
            Quiet quiet;
            if (!m.error) m.error = std::current_exception();
        }
        leave(&m.end);
        {
            Quiet quiet;
            m.self->state = State::done;
        }
        switch_to_home();
    }
}

inline void drop_fibers() {
    auto& m = machine;
    for (auto& f : m.fibers)
        // One that stands in the middle of a kernel may be in a quiet region, where none may end.
        if (f->state == State::done) drop_context(f->tsan);
    allow(m.stacks, m.fibers.size() * kFiberBytes);
    if (!m.fibers.empty()) munmap(m.stacks, m.fibers.size() * kFiberBytes);
    m.fibers.clear();
}

inline void make_fibers(unsigned n) {
    auto& m = machine;
    m.home_tsan = this_context();
    // Those of another thread may have kept addresses of its shared memory.
    if (n <= m.fibers.size() && pthread_equal(m.owner, pthread_self())) return;
    drop_fibers();
    m.owner = pthread_self();
    void* map = mmap(nullptr, n * kFiberBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    m.stacks = static_cast<char*>(map);
    for (unsigned i = 0; i < n; ++i) {
        auto f = std::make_unique<Fiber>();
        f->map = m.stacks + i * kFiberBytes;
        if (mprotect(f->map, kPage, PROT_NONE)) throw std::bad_alloc();
        getcontext(&f->context);
        f->context.uc_stack.ss_sp = f->map + kPage;
        f->context.uc_stack.ss_size = kStackBytes;
        makecontext(&f->context, fiber_main, 0);
        m.fibers.push_back(std::move(f));
    }
}

// Waiting, called by fibers

inline bool wait_for_block(Where where, bool vote = false) {
    auto& m = machine;
    char* tag;
    unsigned turn;
    {
        Quiet quiet;
        Fiber& f = *m.self;
        turn = ++f.barriers & 1;  // two, as in Group
        tag = &m.meetings->barrier[turn];
        m.meetings->vote[turn] |= vote;
        f.state = State::at_barrier, f.operation = "__syncthreads", f.where = where;
    }
    leave(tag);
    {
        Quiet quiet;
        switch_to_home();
    }
    join(tag);
    Quiet quiet;
    return m.meetings->vote[turn];
}

inline Group& group(unsigned warp, unsigned mask) {
    auto& groups = machine.meetings->groups;
    for (auto& g : groups)
        if (g.warp == warp && g.mask == mask) return g;
    return groups.emplace_back(Group{warp, mask, 0, {}, {}});
}

// The group's state for this turn of the calling lane; the lane is not waiting yet.
struct Turn {
    Group& group;
    unsigned k;
};
inline Turn enter_warp(unsigned mask, const char* operation, Where where) {
    Fiber& f = *machine.self;
    const unsigned lane = f.linear % kWarp;
    f.where = where, f.operation = operation, f.mask = mask;
    if (!(mask >> lane & 1)) fail(std::string(operation) + ": the calling lane is not in its own mask", f);
    Group& g = group(f.linear / kWarp, mask);
    g.turns ^= 1u << lane;
    return {g, g.turns >> lane & 1};
}

inline void wait_for_warp(unsigned mask, Where where) {
    char* tag;
    {
        Quiet quiet;
        const Turn turn = enter_warp(mask, "__syncwarp", where);
        tag = &turn.group.tag[turn.k];
    }
    leave(tag);
    {
        Quiet quiet;
        machine.self->state = State::in_warp;
        switch_to_home();
    }
    join(tag);
}

// Every lane of the mask gives a value; `take(slots)` reads those of others once all are there. A shuffle orders no
// memory in CUDA, so nothing is said to the thread sanitizer.
template <class T, class Take>
auto exchange(unsigned mask, T value, const char* operation, Where where, Take take) {
    static_assert(sizeof(T) <= 16);
    Quiet quiet;
    const Turn turn = enter_warp(mask, operation, where);
    Fiber& f = *machine.self;
    auto& slots = turn.group.slot[turn.k];
    std::memcpy(slots[f.linear % kWarp], &value, sizeof value);
    f.state = State::in_warp;
    switch_to_home();
    return take([&](unsigned lane) {
        if (!(mask >> lane & 1)) fail(std::string(operation) + " reads a lane outside the mask", *machine.self);
        T other;
        std::memcpy(&other, slots[lane], sizeof other);
        return other;
    });
}

// Scheduling, on the caller's stack

inline bool same_place(const Fiber& a, const Fiber& b) {
    return a.where.line() == b.where.line() && a.where.column() == b.where.column() &&
           !std::strcmp(a.where.file_name(), b.where.file_name());
}

inline bool free_block() {
    auto& m = machine;
    unsigned live = 0, waiting = 0;
    const Fiber* first = nullptr;
    for (const Fiber* thread : m.thread) {
        const Fiber& f = *thread;
        live += f.state != State::done;
        if (f.state != State::at_barrier) continue;
        ++waiting;
        if (!first) first = &f;
        if (!same_place(*first, f)) fail("divergent __syncthreads", f);
    }
    if (!waiting || waiting < live) return false;
    if (live < m.thread.size()) fail("__syncthreads after some threads returned", *first);
    for (Fiber* f : m.thread) f->state = State::ready;
    m.meetings->vote[(first->barriers + 1) & 1] = false;  // all have read it: they are here
    return true;
}

inline bool free_warps() {
    auto& m = machine;
    bool any = false;
    for (unsigned i = 0; i < m.thread.size(); ++i) {
        const Fiber& f = *m.thread[i];
        if (f.state != State::in_warp) continue;
        const unsigned first = i / kWarp * kWarp;
        const auto in_mask = [&](unsigned lane) { return f.mask >> lane & 1; };
        bool all = true;
        for (unsigned lane = 0; lane < kWarp && all; ++lane) {
            if (!in_mask(lane)) continue;
            if (first + lane >= m.thread.size()) fail(std::string(f.operation) + ": the mask has lanes beyond the block", f);
            const Fiber& other = *m.thread[first + lane];
            all = other.state == State::in_warp && other.mask == f.mask;
            if (all && !same_place(f, other)) fail("divergent warp operations", other);
        }
        if (!all) continue;
        for (unsigned lane = 0; lane < kWarp; ++lane)
            if (in_mask(lane)) m.thread[first + lane]->state = State::ready;
        any = true;
    }
    return any;
}

inline void start_block() {
    auto& m = machine;
    const unsigned n = unsigned(m.thread.size());
    for (unsigned i = 0; i < n; ++i) {
        Fiber& f = *(m.thread[i] = m.fibers[i].get());
        // New threads to the sanitizer: they know what the caller has done, and nothing of other blocks.
        drop_context(f.tsan);
        f.tsan = make_context();
        f.linear = i;
        f.index = {i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y)};
        f.state = State::ready, f.barriers = 0;
    }
    forget(m.stacks, m.fibers.size() * kFiberBytes);
    m.meetings = std::make_unique<Meetings>();
}

inline void run_block(std::vector<unsigned>& order, std::mt19937* random) {
    auto& m = machine;
    for (;;) {
        if (random) std::shuffle(order.begin(), order.end(), *random);
        for (unsigned i : order) {
            if (m.thread[i]->state != State::ready) continue;
            switch_to_fiber(*m.thread[i]);
            if (m.error) std::rethrow_exception(m.error);
        }
        // Nobody can go on by himself.
        bool freed = free_warps();
        freed |= free_block();
        if (freed) continue;
        for (const Fiber* f : m.thread)
            if (f->state != State::done) fail(std::string(f->operation) + ": waits for threads that never come", *f);
        return;
    }
}

// Shared memory: the thread-local data of this library, of which one array is as long as the launch says.
struct Shared {
    char* begin = nullptr;
    std::size_t bytes = 0;
};
inline Shared find_shared(const void* inside) {
    struct Search {
        const char* inside;
        Shared found;
    } search{static_cast<const char*>(inside), {}};
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* data) {
            auto& s = *static_cast<Search*>(data);
            auto* begin = static_cast<char*>(info->dlpi_tls_data);
            for (int k = 0; begin && k < info->dlpi_phnum; ++k) {
                const auto& header = info->dlpi_phdr[k];
                if (header.p_type == PT_TLS && begin <= s.inside && s.inside < begin + header.p_memsz)
                    s.found = {begin, header.p_memsz};
            }
            return 0;
        },
        &search);
    return search.found;
}

struct Launch {
    dim3 grid, block;
    std::size_t shared_bytes;
    unsigned seed;
    std::vector<unsigned char*> dynamic;  // arrays of kMaxShared bytes, one per name and namespace
};

inline void check(const Launch& l) {
    const auto refuse = [](const char* why) { throw std::invalid_argument(why); };
    const auto count = [](dim3 d) { return 1ull * d.x * d.y * d.z; };
    if (!count(l.grid) || !count(l.block)) refuse("empty grid or block");
    if (l.grid.x >> 31 || l.grid.y > 65535 || l.grid.z > 65535) refuse("grid beyond (2^31 - 1, 65535, 65535)");
    if (count(l.block) > 1024 || l.block.z > 64) refuse("block beyond 1024 threads or 64 in z");
    if (l.shared_bytes > kMaxShared) refuse("more than 227 KiB of dynamic shared memory");
}

// All of shared memory becomes NaN, so that what a kernel has not written shows; beyond the dynamic array is forbidden.
inline void fill_shared(Shared all, const Launch& l) {
    auto sorted = l.dynamic;
    std::sort(sorted.begin(), sorted.end());
    char* p = all.begin;
    for (auto* d : sorted) {
        auto* dynamic = reinterpret_cast<char*>(d);
        std::memset(p, 0xff, std::size_t(dynamic - p));
        std::memset(d, 0xff, l.shared_bytes);
        forbid(d + l.shared_bytes, kMaxShared - l.shared_bytes);
        p = dynamic + kMaxShared;
    }
    std::memset(p, 0xff, std::size_t(all.begin + all.bytes - p));
    forget(all.begin, all.bytes);
}

inline void launch(const Launch& l, const std::function<void()>& body) {
    check(l);
    auto& m = machine;
    Quiet quiet;
    const unsigned n = l.block.x * l.block.y * l.block.z;
    m.grid = l.grid, m.block = l.block, m.body = &body, m.error = nullptr;
    make_fibers(n);
    m.thread.resize(n);
    std::vector<unsigned> order(n);
    std::iota(order.begin(), order.end(), 0u);
    std::mt19937 random(l.seed);
    const Shared shared = find_shared(l.dynamic.at(0));
    for (auto* d : l.dynamic) allow(d, kMaxShared);
    std::exception_ptr error;
    try {
        for (unsigned z = 0; z < l.grid.z; ++z)
            for (unsigned y = 0; y < l.grid.y; ++y)
                for (unsigned x = 0; x < l.grid.x; ++x) {
                    m.index = {x, y, z};
                    fill_shared(shared, l);
                    start_block();
                    run_block(order, l.seed ? &random : nullptr);
                }
    } catch (...) {
        error = std::current_exception();
        drop_fibers();  // some stand in the middle of the kernel
    }
    for (auto* d : l.dynamic) allow(d, kMaxShared);
    join(&m.end);
    if (error) std::rethrow_exception(error);
}

}  // namespace sim
