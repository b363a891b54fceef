// y = x W^T + b on integers: W in 8 or 4 bits by groups of 32 inputs, x in 8 bits by token and group.
//
// Weights lie in panels of 32 outputs, and a panel is a run of blocks of 32 inputs, each with all that its
// products need: codes as dwords of four neighbouring inputs (4 bits: a dword holds four inputs in its low
// nibbles, four in its high ones), then the 32 scales and, where there are any, the 32 offsets, in half
// precision. A weight is (code - zero) * scale + offset; codes have no sign.
//
// The sum of a block is exact; blocks are added in order by one chain, so results are batch-invariant.
#pragma once

#include <algorithm>
#include <cstring>

#include "linear.h"

namespace kvarn {

constexpr int GROUP = 32;         // inputs that share a scale
constexpr int QUANTISED_ROWS = 6; // rows multiplied at a time: 12 sums of integers, 12 of floats

// A matrix as the kernels read it. `zero` is 128 for 8 bits.
struct Codes {
    int64_t bits, n, k, zero, offsets;
    const uint8_t* blocks;

    int64_t block() const { return GROUP / 8 * bits * PANEL + (offsets ? 4 : 2) * PANEL; }  // bytes
    int64_t panel() const { return k / GROUP * block(); }
};

// Rows of activations: x = code * scale. `shift` is scale times the sum of the codes, `total` that sum.
struct Quantised {
    int8_t* codes;   // [t, k]
    float* scale;    // [t, k / 32]
    float* shift;    // [t, k / 32]
    int32_t* total;  // [t, k / 32]
};

// codes [n, k] with values 0 to 15 (4 bits) or 0 to 255, scale and offset [n, k / 32] as halves.
inline void pack_codes(const Codes& made, const uint8_t* codes, const uint16_t* scale,
                       const uint16_t* offset, uint8_t* out) {
    const int64_t groups = made.k / GROUP, panels = (made.n + PANEL - 1) / PANEL;
    huge_pages(out, panels * made.panel());
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t g = 0; g < groups; g++) {
            uint8_t* to = out + panel * made.panel() + g * made.block();
            std::memset(to, 0, made.block());
            uint16_t* factors = (uint16_t*)(to + GROUP / 8 * made.bits * PANEL);
            for (int64_t j = 0; j < PANEL && panel * PANEL + j < made.n; j++) {
                const int64_t row = panel * PANEL + j;
                for (int64_t i = 0; i < GROUP; i++) {
                    const uint8_t code = codes[row * made.k + g * GROUP + i];
                    if (made.bits == 8) to[(i / 4 * PANEL + j) * 4 + i % 4] = code;
                    else to[(i / 8 * PANEL + j) * 4 + i % 4] |= code << (i / 4 % 2 * 4);
                }
                factors[j] = scale[row * groups + g];
                if (made.offsets) factors[PANEL + j] = offset[row * groups + g];
            }
        }
}

// One group of 32 activations to 8 bits.
inline void quantise_group(Floats a, Floats b, int8_t* codes, float* scale, float* shift, int32_t* total) {
    const Words magnitude = Words{} + 0x7fffffffu;
    const float top = largest(larger((Floats)((Words)a & magnitude), (Floats)((Words)b & magnitude)));
    const float step = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0.0f;
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Ints low = (Ints)fma(a, splat(inverse), magic) - (Ints)magic;
    const Ints high = (Ints)fma(b, splat(inverse), magic) - (Ints)magic;
    store(codes, __builtin_convertvector(low, Bytes));
    store(codes + 16, __builtin_convertvector(high, Bytes));
    const float added = sum(to_float(low + high));
    *scale = step;
    *shift = step * added;
    *total = (int32_t)added;
}

template <class T>
void quantise_row(const T* x, int64_t k, int64_t row, const Quantised& to) {
    const int64_t groups = k / GROUP;
    for (int64_t g = 0; g < groups; g++)
        quantise_group(Lane<T>::get(x + g * GROUP), Lane<T>::get(x + g * GROUP + 16),
                       to.codes + row * k + g * GROUP, to.scale + row * groups + g,
                       to.shift + row * groups + g, to.total + row * groups + g);
}

template <int M, int BITS>
inline void block_sums(Ints (&acc)[M][2], const uint32_t* const (&x)[M], const uint8_t* codes) {
    constexpr int per = BITS == 8 ? 1 : 2;  // dot products a vector of codes is good for
#pragma GCC unroll 8
    for (int p = 0; p < GROUP / 4 / per; p++) {
        Words column[2];
        for (int j = 0; j < 2; j++) column[j] = load<Words>(codes + (p * PANEL + j * 16) * 4);
#pragma GCC unroll 2
        for (int part = 0; part < per; part++) {
            Words now[2];
            for (int j = 0; j < 2; j++)
                now[j] = per == 1 ? column[j] : column[j] >> (4 * part) & 0x0f0f0f0fu;
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) {
                const Words row = Words{} + x[i][p * per + part];
                for (int j = 0; j < 2; j++) acc[i][j] = dot4(acc[i][j], now[j], row);
            }
        }
    }
}

// M rows of x from `row` against one panel; y has its rows `y_stride` apart, of which `width` outputs count.
template <class U, int M, int BITS, bool OFFSETS>
void quantised_tile(const Codes& w, const uint8_t* panel, const Quantised& x, int64_t row,
                    const float* bias, int64_t width, const uint8_t* ahead, U* y, int64_t y_stride) {
    const int64_t groups = w.k / GROUP, block = w.block();
    Floats acc[M][2];
    for (int i = 0; i < M; i++) acc[i][0] = acc[i][1] = Floats{};
    for (int64_t g = 0; g < groups; g++, panel += block) {
        if (ahead)
            for (int64_t i = 0; i < block; i += 128) __builtin_prefetch(ahead + g * block + i, 0, 2);
        Ints sums[M][2];
        const uint32_t* codes[M];
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            codes[i] = (const uint32_t*)(x.codes + (row + i) * w.k + g * GROUP);
            sums[i][0] = sums[i][1] = Ints{} - (int32_t)w.zero * x.total[(row + i) * groups + g];
        }
        block_sums<M, BITS>(sums, codes, panel);
        const uint16_t* factors = (const uint16_t*)(panel + GROUP / 8 * BITS * PANEL);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const Floats scale = from_half(load<Halves>(factors + j * 16));
            Floats offset;
            if (OFFSETS) offset = from_half(load<Halves>(factors + PANEL + j * 16));
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) {
                const int64_t at = (row + i) * groups + g;
                acc[i][j] = fma(to_float(sums[i][j]), scale * x.scale[at], acc[i][j]);
                if (OFFSETS) acc[i][j] = fma(offset, splat(x.shift[at]), acc[i][j]);
            }
        }
    }
    put_tile<U, M>(acc, bias, width, y, y_stride);
}

template <class U, int M>
void quantised_rows(const Codes& w, const uint8_t* panel, const Quantised& x, int64_t row,
                    const float* bias, int64_t width, const uint8_t* ahead, U* y, int64_t y_stride) {
    if (w.bits == 8 && !w.offsets)
        quantised_tile<U, M, 8, false>(w, panel, x, row, bias, width, ahead, y, y_stride);
    else if (w.bits == 8)
        quantised_tile<U, M, 8, true>(w, panel, x, row, bias, width, ahead, y, y_stride);
    else if (!w.offsets)
        quantised_tile<U, M, 4, false>(w, panel, x, row, bias, width, ahead, y, y_stride);
    else
        quantised_tile<U, M, 4, true>(w, panel, x, row, bias, width, ahead, y, y_stride);
}

template <class U>
using QuantisedTile = void (*)(const Codes&, const uint8_t*, const Quantised&, int64_t, const float*,
                               int64_t, const uint8_t*, U*, int64_t);

template <class U>
constexpr QuantisedTile<U> QUANTISED_TILES[QUANTISED_ROWS + 1] = {
    nullptr,              quantised_rows<U, 1>, quantised_rows<U, 2>, quantised_rows<U, 3>,
    quantised_rows<U, 4>, quantised_rows<U, 5>, quantised_rows<U, 6>,
};

// Rows [lo, hi) against panel `at / 32`.
template <class U>
void quantised_panel(const Codes& w, const Quantised& x, int64_t lo, int64_t hi, int64_t at,
                     const float* bias, U* y, int64_t y_stride, bool bring) {
    const uint8_t* panel = w.blocks + at / PANEL * w.panel();
    const int64_t tiles = (hi - lo + QUANTISED_ROWS - 1) / QUANTISED_ROWS;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t from = lo + (hi - lo) * i / tiles, to = lo + (hi - lo) * (i + 1) / tiles;
        const uint8_t* ahead = bring && tiles > 1 && i < 2 ? panel + w.panel() + 64 * i : nullptr;
        QUANTISED_TILES<U>[to - from](w, panel, x, from, bias ? bias + at : nullptr, w.n - at, ahead,
                                      y + from * y_stride, y_stride);
    }
}

}  // namespace kvarn
