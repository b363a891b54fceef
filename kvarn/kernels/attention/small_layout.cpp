// The work of a captured step, laid out: what `layout.lay_out_small` says, in microseconds.
//
// Items, cuts and merges are those of tiles.py, where the reasons stand; the same numbers in the
// same order. It exists because a round that verifies drafts waits for its layout, and one of a
// drafting model for that of each of its passes.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t STEP = 64, SLACK = 4;  // of tiles.py

struct Rows {
    int64_t spans;
    const int64_t *indptr, *start, *page_indptr, *base;
    int64_t page_size, window, sinks;  // window 0: none
};

struct Cut {
    int64_t height, programs, least;
};

struct Item {
    int64_t row, rows, start, page_at, base, low, high, part;
};

struct Part {
    int64_t row, slot;
    bool unseen;
};

int64_t up(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }

// One item for each span that has rows. `low` is where its own positions begin.
std::vector<Item> own_items(const Rows& rows, const std::vector<int64_t>& low) {
    std::vector<Item> items;
    items.reserve(rows.spans);
    for (int64_t s = 0; s < rows.spans; s++) {
        const int64_t first = rows.indptr[s], n = rows.indptr[s + 1] - first;
        if (n == 0) continue;
        const int64_t start = rows.start[s], base = rows.base[s];
        Item item{first, n, start, rows.page_indptr[s], base, low[s], start + n, 0};
        if (low[s] == base) item.part = -1;
        const int64_t before = std::max<int64_t>(start - rows.window + 1 - base, 0);
        if (rows.window) item.low = base + before / rows.page_size * rows.page_size;
        items.push_back(item);
    }
    return items;
}

// The items of runs of spans (first span, spans, positions shared): every row sees all.
std::vector<Item> shared_items(
    const Rows& rows, const int64_t* runs, int64_t n_runs, int64_t height
) {
    std::vector<Item> items;
    for (const int64_t* run = runs; run < runs + 3 * n_runs; run += 3) {
        const int64_t first = rows.indptr[run[0]], n = rows.indptr[run[0] + run[1]] - first;
        const int64_t pages = rows.page_indptr[run[0]];
        const int64_t base = rows.base[run[0]], end = base + run[2];
        for (int64_t at = 0; at < n; at += height)
            items.push_back({first + at, std::min(height, n - at), end, pages, base, base, end, 0});
    }
    return items;
}

// Positions that an item should have, and the most that any has.
int64_t length_of(
    const std::vector<Item>& items, int64_t kv_heads, const Cut& cut, int64_t* longest
) {
    int64_t positions = 0;
    *longest = 0;
    for (const Item& item : items) {
        positions += item.high - item.low;
        *longest = std::max(*longest, item.high - item.low);
    }
    return up(std::max(up(positions * kv_heads, cut.programs), cut.least), STEP) * STEP;
}

std::vector<Item> split(const std::vector<Item>& items, int64_t kv_heads, const Cut& cut) {
    int64_t longest;
    const int64_t length = length_of(items, kv_heads, cut, &longest), slack = length / SLACK;
    if (longest <= length + slack) return items;
    std::vector<Item> found;
    for (Item item : items) {
        const int64_t end = item.high, span = end - item.low;
        const int64_t aim = std::max<int64_t>(up(span - slack, length), 1);
        const int64_t even = up(span, aim * STEP) * STEP, pieces = up(span, even);
        if (pieces > 1) item.part = 0;
        for (int64_t nth = 0; nth < pieces; nth++) {
            item.high = std::min(end, item.low + even);
            found.push_back(item);
            item.low += even;
        }
    }
    return found;
}

// Number the slots of the partial items, from `n_slots` on.
void number(std::vector<Item>& items, int64_t window, std::vector<Part>& parts) {
    for (Item& item : items) {
        if (item.part < 0) continue;
        item.part = parts.size();
        for (int64_t nth = 0; nth < item.rows; nth++) {
            const bool unseen = window && item.high - item.start - nth <= 1 - window;
            parts.push_back({item.row + nth, int64_t(parts.size()), unseen});
        }
    }
}

// Most KV first; behind the items come idle ones.
void write(std::vector<Item>& items, int32_t* out, int64_t room) {
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
        return a.high - a.low > b.high - b.low;
    });
    for (const Item& item : items)
        for (int64_t field : {item.row, item.rows, item.start, item.page_at, item.base, item.low,
                              item.high, item.part})
            *out++ = int32_t(field);
    for (int64_t left = room - int64_t(items.size()); left > 0; left--) {
        std::fill(out, out + 7, 0);
        out[7] = -1;
        out += 8;
    }
}

// For each row with partial results: row, first entry, entries; then the slots. Returns the rows.
int64_t merges_of(
    std::vector<Part>& parts, std::vector<int32_t>& merges, std::vector<int32_t>& entries
) {
    const auto by_row = [](const Part& a, const Part& b) { return a.row < b.row; };
    std::stable_sort(parts.begin(), parts.end(), by_row);
    for (const Part& part : parts) {
        if (part.unseen) continue;
        if (merges.empty() || merges[merges.size() - 3] != part.row)
            merges.insert(merges.end(), {int32_t(part.row), int32_t(entries.size()), 0});
        merges.back()++;
        entries.push_back(int32_t(part.slot));
    }
    return int64_t(merges.size()) / 3;
}

void copy(const std::vector<int32_t>& from, int32_t* out, int64_t room) {
    std::fill(std::copy(from.begin(), from.end(), out), out + room, 0);
}

}  // namespace

extern "C" {

// Rows of the longest span, and whether any span is split where none shares a prefix.
int64_t kvarn_layout_key(
    int64_t spans, const int64_t* indptr, const int64_t* start, const int64_t* base,
    int64_t page_size, int64_t window, int64_t kv_heads, int64_t programs, int64_t least,
    int64_t* is_split
) {
    const Rows rows{spans, indptr, start, start, base, page_size, window, 0};
    int64_t most = 1, longest;
    for (int64_t s = 0; s < spans; s++) most = std::max(most, indptr[s + 1] - indptr[s]);
    const auto items = own_items(rows, std::vector<int64_t>(base, base + spans));
    const int64_t length = length_of(items, kv_heads, {most, programs, least}, &longest);
    *is_split = longest > length + length / SLACK;
    return most;
}

// `how`: page size, window, sinks, KV heads; height, programs and least of shared prefixes, and of
// the spans' own. `room` in and out: shared items, items, rows merged, entries; there is, and it
// takes. Nothing is written, and 0 returned, where it takes more.
int64_t kvarn_layout_fill(
    int64_t spans, const int64_t* indptr, const int64_t* start, const int64_t* page_indptr,
    const int64_t* base, const int64_t* runs, int64_t n_runs, const int64_t* how, int64_t* room,
    int32_t* shared_out, int32_t* items_out, int32_t* merges_out, int32_t* entries_out
) {
    const Rows rows{spans, indptr, start, page_indptr, base, how[0], how[1], how[2]};
    const Cut whole{how[4], how[5], how[6]}, few{how[7], how[8], how[9]};
    std::vector<int64_t> low(base, base + spans);
    for (const int64_t* run = runs; run < runs + 3 * n_runs; run += 3)
        for (int64_t s = run[0]; s < run[0] + run[1]; s++) low[s] += run[2];
    auto shared = split(shared_items(rows, runs, n_runs, whole.height), how[3], whole);
    auto items = split(own_items(rows, low), how[3], few);
    std::vector<Part> parts;
    const int64_t window = rows.sinks ? 0 : rows.window;  // a row may see sinks alone of an item
    number(shared, window, parts);
    number(items, window, parts);
    const int64_t slots = parts.size();
    std::vector<int32_t> merges, entries;
    const int64_t merged = merges_of(parts, merges, entries);
    const int64_t had[4] = {room[0], room[1], room[2], room[3]};
    room[0] = shared.size(), room[1] = items.size(), room[2] = merged, room[3] = slots;
    for (int i = 0; i < 4; i++)
        if (room[i] > had[i]) return 0;
    write(shared, shared_out, had[0]);
    write(items, items_out, had[1]);
    copy(merges, merges_out, 3 * had[2]);
    copy(entries, entries_out, had[3]);
    return 1;
}

}
