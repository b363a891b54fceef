// y = x W^T + b on packed weights: panels of 32 outputs, [panel][k words][32], zero padded.
// An output is one chain of sums over k whatever the number of rows: results are batch-invariant.
// T is the type of x and W, U the type of y: T, or float for logits.
#pragma once

#include <sys/mman.h>

#include <algorithm>

#include "vec.h"

namespace kvarn {

constexpr int PANEL = 32;  // outputs of a panel: two vectors
constexpr int ROWS = 12;   // rows multiplied at a time: 24 accumulators
constexpr int CHUNK = 10 * ROWS;  // rows that stay in cache while a panel passes

// Fewer TLB misses; a hint, so its failure is harmless.
inline void huge_pages(void* out, int64_t bytes) {
    const uintptr_t huge = 2 << 20, first = ((uintptr_t)out + huge - 1) / huge * huge;
    if (first + huge <= (uintptr_t)out + bytes)
        madvise((void*)first, ((uintptr_t)out + bytes - first) / huge * huge, MADV_HUGEPAGE);
}

template <class T>
void pack(const T* w, int64_t n, int64_t k, uint32_t* out) {
    const int64_t words = k / Lane<T>::per_word;
    const int64_t panels = (n + PANEL - 1) / PANEL;
    huge_pages(out, panels * words * PANEL * 4);
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t p = 0; p < words; p++)
            for (int64_t j = 0; j < PANEL; j++) {
                const int64_t row = panel * PANEL + j;
                uint32_t word = 0;
                if (row < n) std::memcpy(&word, (const uint32_t*)(w + row * k) + p, 4);
                out[(panel * words + p) * PANEL + j] = word;
            }
}

// The sums of M rows and two vectors of outputs, of which the first `width` count.
template <class U, int M>
inline void put_tile(Floats (&acc)[M][2], const float* bias, int64_t width, U* y, int64_t y_stride) {
    for (int j = 0; j < 2; j++) {
        const int some = (int)std::min<int64_t>(16, width - j * 16);
        if (some <= 0) break;
        const Floats add = bias ? get_some(bias + j * 16, some) : Floats{};
        for (int i = 0; i < M; i++) {
            const Floats sum = bias ? acc[i][j] + add : acc[i][j];
            if (some == 16) Lane<U>::put(y + i * y_stride + j * 16, sum);
            else put_some(y + i * y_stride + j * 16, sum, some);
        }
    }
}

template <class T, class U, int M>
void tile(const T* x, int64_t x_stride, const uint32_t* panel, int64_t words, const float* bias,
          int64_t width, const uint32_t* ahead, U* y, int64_t y_stride) {
    Floats acc[M][2];
    const uint32_t* rows[M];
    for (int i = 0; i < M; i++) {
        rows[i] = (const uint32_t*)(x + i * x_stride);
        acc[i][0] = acc[i][1] = Floats{};
    }
    if (ahead) multiply<T, M, 2, true>(acc, rows, panel, PANEL, words, ahead);
    else multiply<T, M, 2>(acc, rows, panel, PANEL, words);
    put_tile<U, M>(acc, bias, width, y, y_stride);
}

template <class T, class U>
using Tile = void (*)(const T*, int64_t, const uint32_t*, int64_t, const float*, int64_t,
                      const uint32_t*, U*, int64_t);

template <class T, class U>
constexpr Tile<T, U> TILES[ROWS + 1] = {
    nullptr,       tile<T, U, 1>, tile<T, U, 2>, tile<T, U, 3>,  tile<T, U, 4>,
    tile<T, U, 5>, tile<T, U, 6>, tile<T, U, 7>, tile<T, U, 8>,  tile<T, U, 9>,
    tile<T, U, 10>, tile<T, U, 11>, tile<T, U, 12>,
};

// Rows [lo, hi) of x against the panel of outputs from `at` on; y has its rows `y_stride` apart. With `bring`
// and more rows than one tile, arithmetic takes longer than reading: two tiles of every panel bring the next
// one into the cache, half of it each.
template <class T, class U>
void linear_panel(const T* x, int64_t x_stride, int64_t words, const uint32_t* packed, int64_t n,
                  int64_t lo, int64_t hi, int64_t at, const float* bias, U* y, int64_t y_stride,
                  bool bring) {
    const uint32_t* panel = packed + at * words;
    const int64_t tiles = (hi - lo + ROWS - 1) / ROWS;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t from = lo + (hi - lo) * i / tiles, to = lo + (hi - lo) * (i + 1) / tiles;
        TILES<T, U>[to - from](x + from * x_stride, x_stride, panel, words, bias ? bias + at : nullptr,
                               n - at, bring && tiles > 1 && i < 2 ? panel + PANEL * words + 16 * i : nullptr,
                               y + from * y_stride, y_stride);
    }
}

}  // namespace kvarn
