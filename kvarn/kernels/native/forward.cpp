// A decoder's layers in one call: the kernels of the other files, phase by phase, in one parallel region.
// The arithmetic is theirs, so the result has the same bits as a call for each operation.
#include "attention.h"
#include "glue.h"
#include "quantized.h"
#include "team.h"

namespace kvarn {

// A linear layer as its form laid it out: panels of words, or blocks of codes.
struct Matrix {
    int64_t n, k;
    const uint32_t* words;  // null where it is quantised
    const Codes* codes;     // null where it is not
    const float* bias;
};

// Weights of a layer; null where the family has none.
struct Layer {
    const void *attn_norm, *q_norm, *k_norm, *attn_post_norm, *mlp_norm, *mlp_post_norm;
    Matrix qkv, out, gate_up, down;
    const float *cos, *sin;  // [positions, dim]
};

struct Model {
    int64_t layers, hidden, ffn, heads, kv_heads, dim, gelu;
    float eps;
    const Layer* layer;
    const void* norm;
};

// One step: rows of the residual stream in, hidden states out.
struct Pass {
    int64_t rows;
    const int64_t* positions;
    void *x, *hidden;         // [rows, hidden]
    const Step* const* step;  // by layer
    void* const* cache;       // by layer
    uint8_t* space;           // of `space()` bytes
};

inline int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The buffers of a step, one after another.
template <class T>
struct Buffers {
    T *normed, *delta, *qkv, *z, *act;
    Quantised input, mid;  // of what is normalised or attended; of the gated activation
    int64_t bytes = 0;

    Buffers(const Model& m, int64_t rows, uint8_t* base) {
        const int64_t attended = m.heads * m.dim, widest = std::max(m.hidden, attended);
        normed = take<T>(base, rows * m.hidden);
        delta = take<T>(base, rows * m.hidden);
        qkv = take<T>(base, rows * (m.heads + 2 * m.kv_heads) * m.dim);
        z = take<T>(base, rows * attended);
        act = take<T>(base, rows * m.ffn);
        input = quantised(base, rows, widest);
        mid = quantised(base, rows, m.ffn);
    }

  private:
    template <class V>
    V* take(uint8_t* base, int64_t n) {
        V* at = (V*)(base + bytes);
        bytes += rounded(n * sizeof(V));
        return at;
    }

    Quantised quantised(uint8_t* base, int64_t rows, int64_t k) {
        Quantised q;
        q.codes = take<int8_t>(base, rows * k);
        q.scale = take<float>(base, rows * (k / GROUP + 1));
        q.shift = take<float>(base, rows * (k / GROUP + 1));
        q.total = take<int32_t>(base, rows * (k / GROUP + 1));
        return q;
    }
};

template <class T>
class Forward {
  public:
    Forward(const Model& m, const Pass& pass)
        : m(m), pass(pass), t(pass.rows), to(m, pass.rows, pass.space) {
        for (int64_t i = 0; i < m.layers; i++) tallest = std::max(tallest, highest(*pass.step[i]));
    }

    void run() {
        const int64_t work = t * m.layers * m.hidden * (m.ffn + m.hidden);
#pragma omp parallel if (work > 30000)
        {
#pragma omp single
            team = std::make_unique<Team>(omp_get_num_threads());
            Scratch<T> scratch(tallest * (m.heads / m.kv_heads), m.dim);
            for (int64_t i = 0; i < m.layers; i++) {
                const Layer& layer = m.layer[i];
                add_norm(i ? m.layer[i - 1].mlp_post_norm : nullptr, i > 0, layer.attn_norm,
                         to.normed, layer.qkv.codes);
                multiply(layer.qkv, to.normed, to.input, to.qkv);
                turn_and_append(i);
                attend_all(i, scratch);
                multiply(layer.out, to.z, to.input, to.delta);
                add_norm(layer.attn_post_norm, true, layer.mlp_norm, to.normed, layer.gate_up.codes);
                gate(layer);
                multiply(layer.down, to.act, to.mid, to.delta);
            }
            add_norm(m.layer[m.layers - 1].mlp_post_norm, true, m.norm, (T*)pass.hidden, nullptr);
        }
    }

  private:
    static int64_t highest(const Step& step) {
        int64_t most = 1;
        for (int64_t i = 0; i < step.items; i++) most = std::max(most, step.work[i * 3 + 2]);
        return most;
    }

    // The residual stream takes up delta, and is normalised into `out`.
    void add_norm(const void* post, bool add, const void* weight, T* out, const Codes* codes) {
        team->share(t, [&](int64_t row) {
            T* x = (T*)pass.x + row * m.hidden;
            T* delta = to.delta + row * m.hidden;
            T* normed = out + row * m.hidden;
            if (add && post)
                norm_row(delta, (const T*)nullptr, (const T*)post, m.eps, m.hidden, delta, (T*)nullptr);
            norm_row(add ? delta : x, add ? x : nullptr, (const T*)weight, m.eps, m.hidden, normed,
                     add ? x : nullptr);
            if (codes) quantise_row(normed, m.hidden, row, to.input);
        });
    }

    template <class U>
    void panel(const Matrix& w, const T* x, const Quantised& q, int64_t lo, int64_t hi, int64_t at,
               U* y, int64_t y_stride, bool bring) {
        if (w.codes)
            quantised_panel(*w.codes, q, lo, hi, at, w.bias, y, y_stride, bring);
        else
            linear_panel(x, w.k, w.k / Lane<T>::per_word, w.words, w.n, lo, hi, at, w.bias, y, y_stride,
                         bring);
    }

    // y [t, n] = x W^T; a chunk of rows stays in the cache while the panels pass.
    void multiply(const Matrix& w, const T* x, const Quantised& q, T* y) {
        const int64_t panels = (w.n + PANEL - 1) / PANEL, chunks = (t + CHUNK - 1) / CHUNK;
        team->share(panels * chunks, [&](int64_t item) {
            const int64_t chunk = item / panels, at = item % panels * PANEL;
            panel(w, x, q, t * chunk / chunks, t * (chunk + 1) / chunks, at, y + at, w.n,
                  chunk == 0 && at + PANEL < w.n);
        });
    }

    // q and k normalised and turned where they are; k and v to their pages.
    void turn_and_append(int64_t i) {
        const Layer& layer = m.layer[i];
        const Step& step = *pass.step[i];
        const int64_t wide = (m.heads + 2 * m.kv_heads) * m.dim;
        team->share(t, [&](int64_t row) {
            const float* cos = layer.cos + pass.positions[row] * m.dim;
            const float* sin = layer.sin + pass.positions[row] * m.dim;
            T* from = to.qkv + row * wide;
            for (int64_t head = 0; head < m.heads + m.kv_heads; head++) {
                T* x = from + head * m.dim;
                const void* factor = head < m.heads ? layer.q_norm : layer.k_norm;
                if (factor)
                    norm_row(x, (const T*)nullptr, (const T*)factor, m.eps, m.dim, x, (T*)nullptr);
                rope_head(x, m.dim, cos, sin, x);
            }
            const T* k = to.qkv + m.heads * m.dim;
            append(step, (T*)pass.cache[i], k, k + m.kv_heads * m.dim, wide, wide, row);
        });
    }

    void attend_all(int64_t i, Scratch<T>& scratch) {
        const Step& step = *pass.step[i];
        const int64_t wide = (m.heads + 2 * m.kv_heads) * m.dim;
        team->share(step.items * m.kv_heads, [&](int64_t at) {
            const int64_t* item = step.work + at / m.kv_heads * 3;
            attend(step, (const T*)pass.cache[i], to.qkv, wide, to.z, nullptr, item[0], item[1], item[2],
                   at % m.kv_heads, scratch);
        });
        if (m.layer[i].out.codes)
            team->share(t, [&](int64_t row) {
                const int64_t attended = m.heads * m.dim;
                quantise_row(to.z + row * attended, attended, row, to.input);
            });
    }

    // act(gate) * up, a panel of each at a time: they are rounded to T on the way, as if stored.
    void gate(const Layer& layer) {
        const Matrix& w = layer.gate_up;
        const int64_t panels = m.ffn / PANEL, chunks = (t + CHUNK - 1) / CHUNK;
        team->share(panels * chunks, [&](int64_t item) {
            alignas(64) T sides[2][CHUNK * PANEL];
            const int64_t chunk = item / panels, at = item % panels * PANEL;
            const int64_t lo = t * chunk / chunks, hi = t * (chunk + 1) / chunks;
            const bool bring = chunk == 0 && at + PANEL < m.ffn;
            for (int side = 0; side < 2; side++)
                panel(w, to.normed, to.input, lo, hi, at + side * m.ffn,
                      sides[side] - lo * PANEL, PANEL, bring);
            for (int64_t row = lo; row < hi; row++) {
                T* out = to.act + row * m.ffn + at;
                const int64_t from = (row - lo) * PANEL, group = row * (m.ffn / GROUP) + at / GROUP;
                gated_row(sides[0] + from, sides[1] + from, PANEL, m.gelu, out);
                if (layer.down.codes)
                    quantise_group(out, to.mid.codes + row * m.ffn + at, to.mid.scale + group,
                                   to.mid.shift + group, to.mid.total + group);
            }
        });
    }

    const Model& m;
    const Pass& pass;
    const int64_t t;
    Buffers<T> to;
    int64_t tallest = 1;
    std::unique_ptr<Team> team;
};

}  // namespace kvarn

using kvarn::bf16;

#define KVARN_FORMS(suffix, T)                                                             \
    void kvarn_forward_##suffix(const kvarn::Model* model, const kvarn::Pass* pass) {      \
        kvarn::Forward<T>(*model, *pass).run();                                            \
    }                                                                                      \
    int64_t kvarn_space_##suffix(const kvarn::Model* model, int64_t rows) {                \
        return kvarn::Buffers<T>(*model, rows, nullptr).bytes;                             \
    }

extern "C" {
KVARN_FORMS(f32, float)
KVARN_FORMS(bf16, bf16)
}
