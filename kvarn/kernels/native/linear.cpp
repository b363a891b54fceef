// The C interface of linear.h.
#include "linear.h"

namespace kvarn {

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
