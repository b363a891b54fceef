// The C interface of glue.h: all rows of a matrix.
#include "glue.h"

namespace kvarn {

constexpr int64_t SERIAL = 65536;  // elements below which a second thread costs more than it brings

// x [outer, inner, dim] with strides; residual, total (both or neither) and out are contiguous.
template <class T, class W>
void rms_norm(const T* x, int64_t outer, int64_t inner, int64_t dim, int64_t outer_stride,
              int64_t inner_stride, const T* residual, const W* weight, float eps, T* out, T* total) {
    const int64_t rows = outer * inner;
#pragma omp parallel for if (rows * dim > SERIAL)
    for (int64_t row = 0; row < rows; row++)
        norm_row(x + row / inner * outer_stride + row % inner * inner_stride,
                 total ? residual + row * dim : nullptr, weight, eps, dim, out + row * dim,
                 total ? total + row * dim : nullptr);
}

// x [t, heads, dim] with row stride; cos and sin [t, dim].
template <class T>
void rope(const T* x, int64_t t, int64_t heads, int64_t dim, int64_t stride, const float* cos,
          const float* sin, T* out) {
#pragma omp parallel for if (t * heads * dim > SERIAL)
    for (int64_t row = 0; row < t; row++)
        for (int64_t head = 0; head < heads; head++)
            rope_head(x + row * stride + head * dim, dim, cos + row * dim, sin + row * dim,
                      out + (row * heads + head) * dim);
}

// out [t, f] = act(x[:, :f]) * x[:, f:]
template <class T>
void gated(const T* x, int64_t t, int64_t f, int64_t stride, int64_t gelu, T* out) {
#pragma omp parallel for if (t * f > SERIAL)
    for (int64_t row = 0; row < t; row++)
        gated_row(x + row * stride, x + row * stride + f, f, gelu, out + row * f);
}

// id [1] = the first place of the largest of x [n], best [1] = its value; a NaN anywhere wins
template <class T>
void argmax_row(const T* x, int64_t n, int64_t* id, float* best) {
    Floats top = splat(-INFINITY), some = {};
    Ints odd = {};
    for (int64_t i = 0; i < n; i += LANES) {
        // the places beyond the end repeat the first number
        some = i + LANES <= n ? Lane<T>::get(x + i) : get_some(x + i, (int)(n - i));
        for (int64_t j = n - i; j < LANES; j++) some[j] = get_some(x, 1)[0];
        odd |= some != some;
        top = larger(some, top);
    }
    float most = largest(top);
    for (int j = 0; j < LANES; j++)
        if (odd[j]) most = NAN;
    *best = most, *id = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats here = i + LANES <= n ? Lane<T>::get(x + i) : get_some(x + i, (int)(n - i));
        const Ints found = here == splat(most);
        for (int64_t j = 0; j < LANES && i + j < n; j++)
            if (found[j]) {
                *id = i + j;
                return;
            }
    }
}

template <class T>
void argmax(const T* x, int64_t rows, int64_t n, int64_t* ids, float* best) {
#pragma omp parallel for if (rows > 1 && rows * n > SERIAL)
    for (int64_t row = 0; row < rows; row++) argmax_row(x + row * n, n, ids + row, best + row);
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
    }                                                                                                \
    void kvarn_argmax_##suffix(const T* x, int64_t rows, int64_t n, int64_t* ids, float* best) {     \
        kvarn::argmax(x, rows, n, ids, best);                                                        \
    }

extern "C" {
KVARN_FORMS(f32, float)
KVARN_FORMS(bf16, bf16)
}
