// The C interface of quantized.h.
#include "quantized.h"

namespace kvarn {

template <class T>
void quantise(const T* x, int64_t t, int64_t k, int64_t x_stride, const Quantised& to) {
#pragma omp parallel for if (t * k > 65536)
    for (int64_t row = 0; row < t; row++) quantise_row(x + row * x_stride, k, row, to);
}

template <class T, class U>
void run_quantised(const Codes& w, const T* x, int64_t t, int64_t x_stride, const Quantised& space,
                   const float* bias, U* y) {
    const int64_t panels = (w.n + PANEL - 1) / PANEL, chunks = (t + CHUNK - 1) / CHUNK;
    if (t == 0) return;
    quantise(x, t, w.k, x_stride, space);
#pragma omp parallel for schedule(static) collapse(2) if (w.n * w.k * t > 30000)
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t panel = 0; panel < panels; panel++)
            quantised_panel(w, space, t * chunk / chunks, t * (chunk + 1) / chunks, panel * PANEL, bias,
                            y + panel * PANEL, w.n, chunk == 0 && panel + 1 < panels);
}

}  // namespace kvarn

using kvarn::bf16;
using kvarn::Codes;
using kvarn::Quantised;

#define KVARN_FORMS(suffix, T)                                                                        \
    void kvarn_quantised_##suffix(const Codes* w, const T* x, int64_t t, int64_t x_stride,            \
                                  const Quantised* space, const float* bias, T* y) {                  \
        kvarn::run_quantised(*w, x, t, x_stride, *space, bias, y);                                    \
    }                                                                                                 \
    void kvarn_quantised_wide_##suffix(const Codes* w, const T* x, int64_t t, int64_t x_stride,       \
                                       const Quantised* space, const float* bias, float* y) {         \
        kvarn::run_quantised(*w, x, t, x_stride, *space, bias, y);                                    \
    }

extern "C" {
KVARN_FORMS(f32, float)
KVARN_FORMS(bf16, bf16)

void kvarn_pack_codes(const Codes* w, const uint8_t* codes, const uint16_t* scale,
                      const uint16_t* offset, uint8_t* out) {
    kvarn::pack_codes(*w, codes, scale, offset, out);
}
}
