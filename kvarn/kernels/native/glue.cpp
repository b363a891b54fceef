// The operations between the matrices: RMSNorm with the residual addition, rotary embedding, gated
// activation. Rows are independent of each other; arithmetic is in fp32, rounded once at the end.
#include <cmath>

#include "vec.h"

namespace kvarn {

constexpr int64_t SERIAL = 65536;  // elements below which a second thread costs more than it brings

template <class T>
inline Floats get_upto(const T* p, int64_t left) {
    return left >= 16 ? Lane<T>::get(p) : get_some(p, (int)left);
}

template <class T>
inline void put_upto(T* p, Floats v, int64_t left) {
    if (left >= 16) Lane<T>::put(p, v);
    else put_some(p, v, (int)left);
}

// x [outer, inner, dim] with strides; residual, total (both or neither) and out are contiguous.
template <class T, class W>
void rms_norm(const T* x, int64_t outer, int64_t inner, int64_t dim, int64_t outer_stride,
              int64_t inner_stride, const T* residual, const W* weight, float eps, T* out, T* total) {
    const int64_t rows = outer * inner;
#pragma omp parallel for if (rows * dim > SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row / inner * outer_stride + row % inner * inner_stride;
        const T* to_norm = from;
        Floats squares = {};
        for (int64_t i = 0; i < dim; i += 16) {
            Floats v = get_upto(from + i, dim - i);
            if (total) {
                v = v + get_upto(residual + row * dim + i, dim - i);
                put_upto(total + row * dim + i, v, dim - i);
                v = get_upto(total + row * dim + i, dim - i);  // as rounded
            }
            squares = fma(v, v, squares);
        }
        if (total) to_norm = total + row * dim;
        const float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
        for (int64_t i = 0; i < dim; i += 16) {
            const Floats v = get_upto(to_norm + i, dim - i) * scale;
            put_upto(out + row * dim + i, v * get_upto(weight + i, dim - i), dim - i);
        }
    }
}

// x [t, heads, dim] with row stride; cos and sin [t, dim], sin negated in its first half.
template <class T>
void rope(const T* x, int64_t t, int64_t heads, int64_t dim, int64_t stride, const float* cos,
          const float* sin, T* out) {
    const int64_t half = dim / 2;
#pragma omp parallel for if (t * heads * dim > SERIAL)
    for (int64_t row = 0; row < t; row++)
        for (int64_t head = 0; head < heads; head++) {
            const T* from = x + row * stride + head * dim;
            T* to = out + (row * heads + head) * dim;
            for (int64_t i = 0; i < half; i += 16) {
                const int64_t left = half - i;
                const Floats a = get_upto(from + i, left), b = get_upto(from + half + i, left);
                const Floats c = get_upto(cos + row * dim + i, left);
                const Floats s = get_upto(sin + row * dim + half + i, left);
                put_upto(to + i, fma(a, c, -(b * s)), left);
                put_upto(to + half + i, fma(b, c, a * s), left);
            }
        }
}

inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

inline Floats gelu_tanh(Floats x) {
    const Floats inner = 0.7978845608028654f * fma(0.044715f * x * x, x, x);
    return 0.5f * x * (1.0f + tanh(inner));
}

// out [t, f] = act(x[:, :f]) * x[:, f:]
template <class T>
void gated(const T* x, int64_t t, int64_t f, int64_t stride, int64_t gelu, T* out) {
#pragma omp parallel for if (t * f > SERIAL)
    for (int64_t row = 0; row < t; row++)
        for (int64_t i = 0; i < f; i += 16) {
            const Floats gate = get_upto(x + row * stride + i, f - i);
            const Floats up = get_upto(x + row * stride + f + i, f - i);
            put_upto(out + row * f + i, (gelu ? gelu_tanh(gate) : silu(gate)) * up, f - i);
        }
}

}  // namespace kvarn

using kvarn::bf16;

#define KVARN_FORMS(suffix, T)                                                                       \
    void kvarn_rms_norm_##suffix(const T* x, int64_t outer, int64_t inner, int64_t dim,              \
                                 int64_t outer_stride, int64_t inner_stride, const T* residual,      \
                                 const void* weight, int64_t wide_weight, float eps, T* out,         \
                                 T* total) {                                                         \
        if (wide_weight)                                                                             \
            kvarn::rms_norm(x, outer, inner, dim, outer_stride, inner_stride, residual,              \
                            (const float*)weight, eps, out, total);                                  \
        else                                                                                         \
            kvarn::rms_norm(x, outer, inner, dim, outer_stride, inner_stride, residual,              \
                            (const T*)weight, eps, out, total);                                      \
    }                                                                                                \
    void kvarn_rope_##suffix(const T* x, int64_t t, int64_t heads, int64_t dim, int64_t stride,      \
                             const float* cos, const float* sin, T* out) {                           \
        kvarn::rope(x, t, heads, dim, stride, cos, sin, out);                                        \
    }                                                                                                \
    void kvarn_gated_##suffix(const T* x, int64_t t, int64_t f, int64_t stride, int64_t gelu,        \
                              T* out) {                                                              \
        kvarn::gated(x, t, f, stride, gelu, out);                                                    \
    }

extern "C" {
KVARN_FORMS(f32, float)
KVARN_FORMS(bf16, bf16)
}
