// The operations between the matrices, a row at a time: RMSNorm with the residual addition, rotary
// embedding, gated activation. Arithmetic is in fp32, rounded once at the end.
#pragma once

#include <cmath>

#include "vec.h"

namespace kvarn {

template <class T>
inline Floats get_upto(const T* p, int64_t left) {
    return left >= LANES ? Lane<T>::get(p) : get_some(p, (int)left);
}

template <class T>
inline void put_upto(T* p, Floats v, int64_t left) {
    if (left >= LANES) Lane<T>::put(p, v);
    else put_some(p, v, (int)left);
}

// out [dim] = x / rms(x) * weight. With `total` x is first added to `residual`, and the rounded sum kept.
template <class T, class W>
void norm_row(const T* x, const T* residual, const W* weight, float eps, int64_t dim, T* out, T* total) {
    Floats squares = {};
    for (int64_t i = 0; i < dim; i += LANES) {
        Floats v = get_upto(x + i, dim - i);
        if (total) {
            v = v + get_upto(residual + i, dim - i);
            put_upto(total + i, v, dim - i);
            v = get_upto(total + i, dim - i);  // as rounded
        }
        squares = fma(v, v, squares);
    }
    const T* from = total ? total : x;
    const float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
    for (int64_t i = 0; i < dim; i += LANES) {
        const Floats v = get_upto(from + i, dim - i) * scale;
        put_upto(out + i, v * get_upto(weight + i, dim - i), dim - i);
    }
}

// One head [dim] turned; cos and sin [dim], sin negated in its first half; `to` may be `from`.
template <class T>
void rope_head(const T* from, int64_t dim, const float* cos, const float* sin, T* to) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t left = half - i;
        const Floats a = get_upto(from + i, left), b = get_upto(from + half + i, left);
        const Floats c = get_upto(cos + i, left);
        const Floats s = get_upto(sin + half + i, left);
        put_upto(to + i, fma(a, c, -(b * s)), left);
        put_upto(to + half + i, fma(b, c, a * s), left);
    }
}

inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

inline Floats gelu_tanh(Floats x) {
    const Floats inner = 0.7978845608028654f * fma(0.044715f * x * x, x, x);
    return 0.5f * x * (1.0f + tanh(inner));
}

// out [n] = act(gate) * up
template <class T>
void gated_row(const T* gate, const T* up, int64_t n, bool gelu, T* out) {
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats g = get_upto(gate + i, n - i);
        put_upto(out + i, (gelu ? gelu_tanh(g) : silu(g)) * get_upto(up + i, n - i), n - i);
    }
}

}  // namespace kvarn
