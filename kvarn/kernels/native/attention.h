// Paged attention of any mixture of spans: decode rows, chunks with earlier context, fresh prompts.
//
// One item of work is a block of a span's rows against one KV head, the query heads of that KV head folded
// into the rows (FlashInfer's head-group packing). The block walks over tiles of KV that start at multiples of
// TILE positions, keeping a running softmax a row. Each row's arithmetic depends on its position and its
// KV alone: neither the block, the chunk nor the number of threads changes a bit of the result.
// `attend` is compiled in attention.cpp alone.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "vec.h"

namespace kvarn {

constexpr int TILE = 64;  // positions of KV a step

// The step as `PagedRows` has it, and the shapes. Cache of a layer: [pages, kv heads, 2, page_size, dim].
struct Step {
    int64_t spans, rows, heads, kv_heads, dim, page_size;
    const int64_t *indptr, *start, *page_indptr, *pages, *base, *slots;
    int64_t window;  // 0: none
    int64_t sinks;   // first positions that are seen beside the window
    float scale, softcap;  // softcap 0: none
    int64_t items;
    const int64_t* work;  // [items, 3]: span, first row, number of rows
};

struct Free {
    void operator()(void* p) const { std::free(p); }
};

template <class V>
using Buffer = std::unique_ptr<V[], Free>;

template <class V>
Buffer<V> buffer(int64_t n) {
    return Buffer<V>((V*)std::aligned_alloc(64, (n * sizeof(V) + 63) / 64 * 64));
}

// What one thread works in.
template <class T>
struct Scratch {
    int64_t words, wide;  // of a row: words of 32 bits, and dim rounded up to 64
    Buffer<uint32_t> q, keys, weights, values, zero;
    Buffer<float> scores, o, peak, total;

    Scratch(int64_t rows, int64_t dim)
        : words(dim / Lane<T>::per_word),
          wide((dim + 63) / 64 * 64),
          q(buffer<uint32_t>(rows * words)),
          keys(buffer<uint32_t>((words + 15) / 16 * 16 * TILE)),
          weights(buffer<uint32_t>(rows * TILE)),
          values(buffer<uint32_t>(TILE * wide)),
          zero(buffer<uint32_t>(wide)),
          scores(buffer<float>(rows * TILE)),
          o(buffer<float>(rows * wide)),
          peak(buffer<float>(rows)),
          total(buffer<float>(rows)) {
        std::memset(zero.get(), 0, wide * 4);
        std::memset(values.get(), 0, TILE * wide * 4);  // columns from dim on stay zero
    }
};

// Rows [row, row + n) of a span against one KV head: q [T, heads, dim] with row stride, o [T, heads, dim].
template <class T>
void attend(const Step& step, const T* cache, const T* q, int64_t q_stride, T* o, float* lse,
            int64_t span, int64_t row, int64_t n, int64_t head, Scratch<T>& s);

template <class T>
void append(const Step& step, T* cache, const T* k, const T* v, int64_t k_stride, int64_t v_stride,
            int64_t row) {
    const int64_t page = step.slots[row] / step.page_size, inside = step.slots[row] % step.page_size;
    const int64_t plane = step.page_size * step.dim;
    for (int64_t head = 0; head < step.kv_heads; head++) {
        T* to = cache + (page * step.kv_heads + head) * 2 * plane + inside * step.dim;
        std::memcpy(to, k + row * k_stride + head * step.dim, step.dim * sizeof(T));
        std::memcpy(to + plane, v + row * v_stride + head * step.dim,
                    step.dim * sizeof(T));
    }
}

}  // namespace kvarn
