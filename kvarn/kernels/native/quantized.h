// y = x W^T + b on integers: W in 8 or 4 bits by groups of 32 inputs, x in 8 bits by token and group.
//
// Weights lie in panels of 32 outputs, and a panel is a run of blocks of 32 inputs, each with all that its
// products need: codes as dwords of four neighbouring inputs (4 bits: a dword holds four inputs in its low
// nibbles, four in its high ones), then the 32 scales and, where there are any, the 32 offsets, in half
// precision. A weight is (code - zero) * scale + offset; codes have no sign.
//
// The sum of a block is exact; blocks are added in order by one chain, so results are batch-invariant.
// The loops are compiled in quantized.cpp alone.
#pragma once

#include <algorithm>
#include <cstring>

#include "linear.h"

namespace kvarn {

constexpr int GROUP = 32;         // inputs that share a scale
constexpr int QUANTISED_ROWS = 6; // rows multiplied at a time
constexpr int WIDTH = HELD_COLUMNS < PANEL ? HELD_COLUMNS : PANEL;  // outputs, by WIDTH / LANES sums

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

// One group of activations to 8 bits.
template <class T>
inline void quantise_group(const T* x, int8_t* codes, float* scale, float* shift, int32_t* total) {
    constexpr int vectors = GROUP / LANES;
    const Words magnitude = Words{} + 0x7fffffffu;
    Floats wide[vectors], most = {};
    for (int j = 0; j < vectors; j++) {
        wide[j] = Lane<T>::get(x + j * LANES);
        most = larger(most, (Floats)((Words)wide[j] & magnitude));
    }
    const float top = largest(most), step = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0.0f;
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Ints all = {};
    for (int j = 0; j < vectors; j++) {
        const Ints code = (Ints)fma(wide[j], splat(inverse), magic) - (Ints)magic;
        store(codes + j * LANES, __builtin_convertvector(code, Bytes));
        all += code;
    }
    const float added = sum(to_float(all));
    *scale = step;
    *shift = step * added;
    *total = (int32_t)added;
}

template <class T>
void quantise_row(const T* x, int64_t k, int64_t row, const Quantised& to) {
    const int64_t groups = k / GROUP;
    for (int64_t g = 0; g < groups; g++)
        quantise_group(x + g * GROUP, to.codes + row * k + g * GROUP, to.scale + row * groups + g,
                       to.shift + row * groups + g, to.total + row * groups + g);
}

// Rows [lo, hi) against panel `at / 32`.
template <class U>
void quantised_panel(const Codes& w, const Quantised& x, int64_t lo, int64_t hi, int64_t at,
                     const float* bias, U* y, int64_t y_stride, bool bring);

}  // namespace kvarn
