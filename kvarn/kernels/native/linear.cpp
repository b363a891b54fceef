// The loops of linear.h, and their C interface.
#include "linear.h"

namespace kvarn {

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

// The sums of M rows against one panel. What they become is the caller's: one loop serves all types of y.
template <class T, int M>
void tile(const T* x, int64_t x_stride, const uint32_t* panel, int64_t words, const uint32_t* ahead,
          Floats (*out)[VECTORS]) {
    Floats acc[M][VECTORS];
    const uint32_t* rows[M];
    for (int i = 0; i < M; i++) {
        rows[i] = (const uint32_t*)(x + i * x_stride);
        for (int j = 0; j < VECTORS; j++) acc[i][j] = Floats{};
    }
    if (ahead) multiply<T, M, VECTORS, true>(acc, rows, panel, PANEL, words, ahead);
    else multiply<T, M, VECTORS>(acc, rows, panel, PANEL, words);
    std::memcpy(out, acc, sizeof acc);
}

template <class T>
using Tile = void (*)(const T*, int64_t, const uint32_t*, int64_t, const uint32_t*, Floats (*)[VECTORS]);

template <class T>
constexpr Tile<T> TILES[ROWS + 1] = {
    nullptr,    tile<T, 1>, tile<T, 2>, tile<T, 3>,  tile<T, 4>,  tile<T, 5>,  tile<T, 6>,
    tile<T, 7>, tile<T, 8>, tile<T, 9>, tile<T, 10>, tile<T, 11>, tile<T, 12>,
};

template <class T, class U>
void linear_panel(const T* x, int64_t x_stride, int64_t words, const uint32_t* packed, int64_t n,
                  int64_t lo, int64_t hi, int64_t at, const float* bias, U* y, int64_t y_stride,
                  bool bring) {
    const uint32_t* panel = packed + at * words;
    const int64_t tiles = (hi - lo + ROWS - 1) / ROWS;
    Floats sums[ROWS][VECTORS];
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t from = lo + (hi - lo) * i / tiles, to = lo + (hi - lo) * (i + 1) / tiles;
        const bool fetch = bring && tiles > 1 && i < 2;
        TILES<T>[to - from](x + from * x_stride, x_stride, panel, words,
                            fetch ? panel + PANEL * words + 16 * i : nullptr, sums);
        put_tile(sums, (int)(to - from), bias ? bias + at : nullptr, n - at, y + from * y_stride,
                 y_stride);
    }
}

template void linear_panel(const float*, int64_t, int64_t, const uint32_t*, int64_t, int64_t, int64_t,
                           int64_t, const float*, float*, int64_t, bool);
template void linear_panel(const bf16*, int64_t, int64_t, const uint32_t*, int64_t, int64_t, int64_t,
                           int64_t, const float*, bf16*, int64_t, bool);
template void linear_panel(const bf16*, int64_t, int64_t, const uint32_t*, int64_t, int64_t, int64_t,
                           int64_t, const float*, float*, int64_t, bool);

template <class T, class U>
void run(const T* x, int64_t t, int64_t k, int64_t x_stride, const uint32_t* packed,
         const float* bias, int64_t n, U* y) {
    const int64_t words = k / Lane<T>::per_word;
    const int64_t panels = (n + PANEL - 1) / PANEL;
    const int64_t chunks = (t + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) collapse(2) if (n * k * t > 30000)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const bool bring = chunk == 0 && panel + 1 < panels;
            linear_panel(x, x_stride, words, packed, n, t * chunk / chunks, t * (chunk + 1) / chunks,
                         panel * PANEL, bias, y + panel * PANEL, n, bring);
        }
}

}  // namespace kvarn

extern "C" {

using kvarn::bf16;

void kvarn_pack_f32(const float* w, int64_t n, int64_t k, uint32_t* out) { kvarn::pack(w, n, k, out); }
void kvarn_pack_bf16(const bf16* w, int64_t n, int64_t k, uint32_t* out) { kvarn::pack(w, n, k, out); }

void kvarn_linear_f32(const float* x, int64_t t, int64_t k, int64_t x_stride, const uint32_t* packed,
                      const float* bias, int64_t n, float* y) {
    kvarn::run(x, t, k, x_stride, packed, bias, n, y);
}

void kvarn_linear_bf16(const bf16* x, int64_t t, int64_t k, int64_t x_stride, const uint32_t* packed,
                       const float* bias, int64_t n, bf16* y) {
    kvarn::run(x, t, k, x_stride, packed, bias, n, y);
}

void kvarn_linear_wide_f32(const float* x, int64_t t, int64_t k, int64_t x_stride,
                           const uint32_t* packed, const float* bias, int64_t n, float* y) {
    kvarn::run(x, t, k, x_stride, packed, bias, n, y);
}

void kvarn_linear_wide_bf16(const bf16* x, int64_t t, int64_t k, int64_t x_stride,
                            const uint32_t* packed, const float* bias, int64_t n, float* y) {
    kvarn::run(x, t, k, x_stride, packed, bias, n, y);
}
}
