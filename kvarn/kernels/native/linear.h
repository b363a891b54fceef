// y = x W^T + b on packed weights: panels of 32 outputs, [panel][k words][32], zero padded.
// An output is one chain of sums over k whatever the number of rows: results are batch-invariant.
// T is the type of x and W, U the type of y: T, or float for logits. The loops are compiled in linear.cpp alone.
#pragma once

#include <sys/mman.h>

#include <algorithm>

#include "vec.h"

namespace kvarn {

constexpr int PANEL = 32;  // outputs of a panel
constexpr int VECTORS = PANEL / LANES;  // of sums of a row
constexpr int ROWS = 12;   // rows multiplied at a time
constexpr int CHUNK = 10 * ROWS;  // rows that stay in cache while a panel passes

// Fewer TLB misses; a hint, so its failure is harmless.
inline void huge_pages(void* out, int64_t bytes) {
    const uintptr_t huge = 2 << 20, first = ((uintptr_t)out + huge - 1) / huge * huge;
    if (first + huge <= (uintptr_t)out + bytes)
        madvise((void*)first, ((uintptr_t)out + bytes - first) / huge * huge, MADV_HUGEPAGE);
}

// The sums of m rows of outputs, of which the first `width` count.
template <class U>
inline void put_tile(const Floats (*acc)[VECTORS], int m, const float* bias, int64_t width, U* y,
                     int64_t y_stride) {
    for (int j = 0; j < VECTORS; j++) {
        const int some = (int)std::min<int64_t>(LANES, width - j * LANES);
        if (some <= 0) break;
        const Floats add = bias ? get_some(bias + j * LANES, some) : Floats{};
        for (int i = 0; i < m; i++) {
            const Floats sum = bias ? acc[i][j] + add : acc[i][j];
            if (some == LANES) Lane<U>::put(y + i * y_stride + j * LANES, sum);
            else put_some(y + i * y_stride + j * LANES, sum, some);
        }
    }
}

// Rows [lo, hi) of x against the panel of outputs from `at` on; y has its rows `y_stride` apart. With `bring`
// and more rows than one tile, arithmetic takes longer than reading: two tiles of every panel bring the next
// one into the cache, half of it each.
template <class T, class U>
void linear_panel(const T* x, int64_t x_stride, int64_t words, const uint32_t* packed, int64_t n,
                  int64_t lo, int64_t hi, int64_t at, const float* bias, U* y, int64_t y_stride,
                  bool bring);

}  // namespace kvarn
