// The threads of one parallel region, working through phases: shared items, then a barrier.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
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
    // Spins, because a phase lasts microseconds; a core that another process wants is given up.
    void wait() {
        const int64_t mine = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            next.store(0, std::memory_order_relaxed);
            phase.store(mine + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase.load(std::memory_order_acquire) == mine; spins++) {
            if (spins > 4000) sched_yield();
#if defined(__x86_64__)
            else _mm_pause();
#endif
        }
    }

    const int threads;
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int64_t> phase{0};
};

}  // namespace kvarn
