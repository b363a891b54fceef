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

// Rows [lo, hi) against panel `at / 32`.
template <class U>
void quantised_panel(const Codes& w, const Quantised& x, int64_t lo, int64_t hi, int64_t at,
                     const float* bias, U* y, int64_t y_stride, bool bring);

}  // namespace kvarn
