// The threads of one parallel region, working through phases: shared items, then a barrier.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvarn {

class Team {
  public:
    explicit Team(int threads) : threads(threads) {}

    // Calls work(item) for every item, each on whichever thread is free, and waits for all of them.
    template <class F>
    void share(int64_t items, F work) {
        if (threads == 1) {
            for (int64_t i = 0; i < items; i++) work(i);
            return;
        }
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(i);
        wait();
    }

  private:
    // Spins first, because a phase lasts microseconds; then sleeps, because another process may want
    // the core, and the thread that is waited for may be without one.
    void wait() {
        const int32_t mine = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            next.store(0, std::memory_order_relaxed);
            phase.store(mine + 1);
            if (sleepers.load() > 0) wake();
            return;
        }
        for (int spins = 0; spins < SPINS; spins++) {
            if (phase.load(std::memory_order_acquire) != mine) return;
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
        sleepers.fetch_add(1);
        while (phase.load() == mine) sleep(mine);
        sleepers.fetch_sub(1);
    }

#if defined(__linux__)
    void sleep(int32_t mine) { syscall(SYS_futex, &phase, FUTEX_WAIT_PRIVATE, mine, 0, 0, 0); }
    void wake() { syscall(SYS_futex, &phase, FUTEX_WAKE_PRIVATE, threads, 0, 0, 0); }
#else
    void sleep(int32_t) { sched_yield(); }
    void wake() {}
#endif

    static constexpr int SPINS = 3000;  // some 50 us
    const int threads;
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int32_t> phase{0};
    std::atomic<int> sleepers{0};
};

}  // namespace kvarn
