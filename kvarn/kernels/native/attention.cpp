// The C interface of attention.h.
#include "attention.h"

namespace kvarn {

constexpr int64_t SERIAL = 100000;  // products below which a second thread costs more than it brings

// All rows are written before any row attends: spans may see each other's pages.
template <class T>
void run(const Step& step, T* cache, const T* q, const T* k, const T* v, int64_t q_stride,
         int64_t k_stride, int64_t v_stride, T* o, float* lse) {
    const int64_t group = step.heads / step.kv_heads;
    int64_t tallest = 1, cost = 0;
    for (int64_t i = 0; i < step.items; i++) {
        const int64_t* item = step.work + i * 3;
        tallest = std::max(tallest, item[2]);
        cost += (step.start[item[0]] + item[1] - step.indptr[item[0]] + item[2]) * item[2];
    }
    const bool wide = cost * step.heads * step.dim > SERIAL;
#pragma omp parallel if (wide)
    {
#pragma omp for
        for (int64_t row = 0; row < step.rows; row++)
            append(step, cache, k, v, k_stride, v_stride, row);
        Scratch<T> scratch(tallest * group, step.dim);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < step.items * step.kv_heads; i++) {
            const int64_t* item = step.work + i / step.kv_heads * 3;
            attend(step, cache, q, q_stride, o, lse, item[0], item[1], item[2], i % step.kv_heads,
                   scratch);
        }
    }
}

}  // namespace kvarn

extern "C" {

using kvarn::bf16;

void kvarn_attention_f32(const kvarn::Step* step, float* cache, const float* q, const float* k,
                         const float* v, int64_t q_stride, int64_t k_stride, int64_t v_stride, float* o,
                         float* lse) {
    kvarn::run(*step, cache, q, k, v, q_stride, k_stride, v_stride, o, lse);
}

void kvarn_attention_bf16(const kvarn::Step* step, bf16* cache, const bf16* q, const bf16* k,
                          const bf16* v, int64_t q_stride, int64_t k_stride, int64_t v_stride, bf16* o,
                          float* lse) {
    kvarn::run(*step, cache, q, k, v, q_stride, k_stride, v_stride, o, lse);
}
}
