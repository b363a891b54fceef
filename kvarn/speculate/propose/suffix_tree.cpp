// The counted suffix tree of suffix_tree.py, in C++: the same counts and the same drafts, token for
// token (tests/property/test_suffix_tree.py plays both). What is said there of nodes, labels and
// open suffixes holds here; this file says only what differs.
//
// Nodes are 44 bytes in one pool and point to each other by index; 0 is the root, and as a child,
// sibling, best child or next of a bucket it means none. A child is found by (parent, first token
// of its edge) in one hash table for the whole tree, whose buckets are split one at a time as it
// grows (linear hashing): no call ever pays for moving all of it. Texts count the labels that
// refer to them, and go when they are removed and no label is left.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <queue>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace {

using Index = int32_t;

struct Node {
    Index parent = 0, text = 0;
    int32_t token = 0, start = 0, length = 0, count = 0;
    Index best = 0;                       // most frequent child; 0: not known
    Index child = 0, next = 0, prev = 0;  // first child; neighbours among the parent's children
    Index chain = 0;                      // next of the same bucket
};

struct Text {
    std::vector<int32_t> tokens;
    std::vector<Index> ends;  // node of each open suffix by length, the root first
    int64_t labels = 0;
    bool removed = false;
};

struct Drafting {
    double cap, factor, offset, min_prob;
    bool tree;
};

struct Found {
    std::vector<int32_t> tokens, parents;
    std::vector<double> confidence;
    double score = 0;
    int64_t matched = 0;

    void add(int32_t token, int32_t parent, double sure, double prob) {
        tokens.push_back(token);
        parents.push_back(parent);
        confidence.push_back(sure);
        score += prob;
    }
};

class Tree {
public:
    explicit Tree(int64_t depth) : depth_(depth), nodes_(1), buckets_(1, 0) {}

    bool extend(int64_t key, const int32_t* tokens, int64_t n) {
        auto known = keys_.find(key);
        Index id = known == keys_.end() ? fresh_text(key) : known->second;
        Text& text = texts_[id];
        if (text.ends.empty()) return false;  // closed
        for (int64_t i = 0; i < n; ++i) {
            int32_t at = int32_t(text.tokens.size());
            text.tokens.push_back(tokens[i]);
            for (Index& end : text.ends) end = advance(end, id, at, tokens[i]);
            if (int64_t(text.ends.size()) == depth_) text.ends.pop_back();
            text.ends.insert(text.ends.begin(), 0);
        }
        return true;
    }

    void close(int64_t key) {
        auto known = keys_.find(key);
        if (known == keys_.end()) return;
        Text& text = texts_[known->second];
        std::vector<Index>().swap(text.ends);
        text.tokens.shrink_to_fit();
    }

    // The number of tokens that went; -1: no such sequence.
    int64_t remove(int64_t key) {
        auto known = keys_.find(key);
        if (known == keys_.end()) return -1;
        Index id = known->second;
        keys_.erase(known);
        Text& text = texts_[id];
        text.removed = true;
        text.labels++;  // ours, while we read it
        int64_t n = int64_t(text.tokens.size());
        for (int64_t start = 0; start < n; ++start) drop(text, start);
        unlabel(id);
        return n;
    }

    int64_t count(const int32_t* run, int64_t n) const {
        auto [node, along] = walk(run, n);
        return along < 0 ? 0 : nodes_[node].count;
    }

    int64_t live() const { return int64_t(nodes_.size() - spare_.size()) - 1; }

    Found speculate(const int32_t* context, int64_t n, const Drafting& how) {
        int64_t length = std::min(n, depth_);
        const int32_t* end = context + n;
        std::vector<std::pair<double, int64_t>> lengths;  // room for tokens, and match
        for (int64_t matched = longest(end, length); matched > 0; --matched) {
            double most = std::min(how.cap, std::floor(how.factor * double(matched) + how.offset));
            lengths.emplace_back(how.tree ? most : std::min(most, double(depth_ - matched)), matched);
        }
        std::sort(lengths.rbegin(), lengths.rend());
        Found best;
        for (auto [most, matched] : lengths) {
            if (most < 1) break;
            if (std::make_pair(most, matched) <= std::make_pair(best.score, best.matched)) continue;
            auto [node, along] = walk(end - matched, matched);
            Found found = how.tree ? branches(node, along, most, how.min_prob)
                                   : follow(node, along, most, how.min_prob);
            if (!found.tokens.empty() && std::make_pair(found.score, matched) >
                                             std::make_pair(best.score, best.matched)) {
                best = std::move(found);
                best.matched = matched;
            }
        }
        return best;
    }

private:
    int64_t depth_;
    std::deque<Node> nodes_;
    std::vector<Index> spare_;    // nodes that were given back
    std::deque<Index> buckets_;   // first node of each chain
    size_t half_ = 1;             // buckets below `buckets_.size() - half_` are split already
    std::deque<Text> texts_;
    std::vector<Index> spare_texts_;
    std::unordered_map<int64_t, Index> keys_;

    // texts and nodes

    Index fresh_text(int64_t key) {
        Index id = Index(texts_.size());
        if (spare_texts_.empty()) {
            texts_.emplace_back();
        } else {
            id = spare_texts_.back();
            spare_texts_.pop_back();
        }
        texts_[id].ends.assign(1, 0);
        keys_.emplace(key, id);
        return id;
    }

    void unlabel(Index id) {
        Text& text = texts_[id];
        if (--text.labels || !text.removed) return;
        text = Text();
        spare_texts_.push_back(id);
    }

    void label(Index node, Index text, int32_t start) {
        Node& n = nodes_[node];
        n.start = start;
        if (n.text == text) return;
        texts_[text].labels++;
        unlabel(n.text);
        n.text = text;
    }

    Index make(Index parent, Index text, int32_t start, int32_t length, int32_t count) {
        Index id = Index(nodes_.size());
        if (spare_.empty()) {
            nodes_.emplace_back();
        } else {
            id = spare_.back();
            spare_.pop_back();
        }
        Node& n = nodes_[id] = Node();
        n.text = text, n.start = start, n.length = length, n.count = count;
        texts_[text].labels++;
        link(id, parent);
        return id;
    }

    void free(Index id) {
        unlabel(nodes_[id].text);
        spare_.push_back(id);
    }

    int32_t token_at(const Node& n, int64_t along) const {
        return texts_[n.text].tokens[n.start + along];
    }

    // children

    size_t bucket(Index parent, int32_t token) const {
        uint64_t h = (uint64_t(uint32_t(parent)) << 32 | uint32_t(token)) * 0x9E3779B97F4A7C15u;
        h ^= h >> 32;
        size_t at = h & (2 * half_ - 1);
        return at < buckets_.size() ? at : at - half_;
    }

    Index find(Index parent, int32_t token) const {
        if (!nodes_[parent].child) return 0;
        Index id = buckets_[bucket(parent, token)];
        while (id && (nodes_[id].token != token || nodes_[id].parent != parent))
            id = nodes_[id].chain;
        return id;
    }

    void chain(Index id) {
        Index& first = buckets_[bucket(nodes_[id].parent, nodes_[id].token)];
        nodes_[id].chain = first;
        first = id;
    }

    void unchain(Index id) {
        Index* at = &buckets_[bucket(nodes_[id].parent, nodes_[id].token)];
        while (*at != id) at = &nodes_[*at].chain;
        *at = nodes_[id].chain;
    }

    void split_bucket() {
        size_t from = buckets_.size() - half_;
        buckets_.push_back(0);
        Index id = buckets_[from];
        buckets_[from] = 0;
        while (id) {
            Index next = nodes_[id].chain;
            chain(id);
            id = next;
        }
        if (buckets_.size() == 2 * half_) half_ *= 2;
    }

    void link(Index id, Index parent) {
        Node& n = nodes_[id];
        n.parent = parent;
        n.token = token_at(n, 0);
        n.prev = 0;
        n.next = nodes_[parent].child;
        if (n.next) nodes_[n.next].prev = id;
        nodes_[parent].child = id;
        chain(id);
        if (buckets_.size() < nodes_.size()) split_bucket();
    }

    void unlink(Index id) {
        unchain(id);
        Node& n = nodes_[id];
        if (n.next) nodes_[n.next].prev = n.prev;
        (n.prev ? nodes_[n.prev].next : nodes_[n.parent].child) = n.next;
    }

    Index only(const Node& n) const { return n.child && !nodes_[n.child].next ? n.child : 0; }

    bool before(Index a, Index b) const {
        const Node &x = nodes_[a], &y = nodes_[b];
        return x.count != y.count ? x.count > y.count : x.token < y.token;
    }

    Index first(Index node) {
        Node& n = nodes_[node];
        if (!n.best)
            for (Index c = n.child; c; c = nodes_[c].next)
                if (!n.best || before(c, n.best)) n.best = c;
        return n.best;
    }

    void rose(Index node, Index child) {
        Node& n = nodes_[node];
        if (n.best == child) return;
        if (!n.best)
            n.best = only(n);
        else if (before(child, n.best))
            n.best = child;
    }

    // append

    Index advance(Index node, Index text, int32_t at, int32_t token) {
        Index child = find(node, token);
        Node& n = nodes_[node];
        if (!child) {
            if (!n.child && n.count == 1) {
                label(node, text, at - n.length);
                n.length++;
                return node;
            }
            Index leaf = make(node, text, at, 1, 1);
            rose(node, leaf);
            return leaf;
        }
        Node& c = nodes_[child];
        if (c.length == 1) {
            c.count++;
            label(child, text, at);
            rose(node, child);
            join(node);
            return child;
        }
        if (node && only(n) && n.count == c.count + 1) {
            label(node, text, at - n.length);
            n.length++;
            shorten(child);
            link(child, node);
            n.best = child;
            return node;
        }
        return split(node, child, text, at);
    }

    void shorten(Index child) {
        unlink(child);
        nodes_[child].start++;
        nodes_[child].length--;
    }

    Index split(Index node, Index child, Index text, int32_t at) {
        shorten(child);
        Index upper = make(node, text, at, 1, nodes_[child].count + 1);
        link(child, upper);
        nodes_[upper].best = child;
        if (nodes_[node].best == child)
            nodes_[node].best = upper;
        else
            rose(node, upper);
        return upper;
    }

    void join(Index node) {
        Node& n = nodes_[node];
        Index child = only(n);
        if (!node || !child || nodes_[child].count != n.count) return;
        Index parent = n.parent;
        unlink(child);
        unlink(node);
        nodes_[child].start -= n.length;
        nodes_[child].length += n.length;
        link(child, parent);
        if (nodes_[parent].best == node) nodes_[parent].best = child;
        free(node);
    }

    // removal

    void drop(const Text& text, int64_t start) {
        Index node = 0;
        int64_t at = start, end = std::min(int64_t(text.tokens.size()), start + depth_);
        while (at < end) {
            Index child = find(node, text.tokens[at]);
            Node& c = nodes_[child];
            c.count--;
            if (nodes_[node].best == child) nodes_[node].best = 0;
            if (!c.count) {
                unlink(child);
                free(child);
                break;
            }
            at += c.length;
            node = child;
        }
        join(node);
    }

    // match

    // The node on whose edge the run ends, and how far along; -1: it does not occur.
    std::pair<Index, int64_t> walk(const int32_t* run, int64_t n) const {
        Index node = 0;
        for (int64_t at = 0; at < n;) {
            node = find(node, run[at]);
            if (!node) return {0, -1};
            const Node& found = nodes_[node];
            int64_t step = std::min(int64_t(found.length), n - at);
            const int32_t* label = texts_[found.text].tokens.data() + found.start;
            if (!std::equal(label, label + step, run + at)) return {0, -1};
            at += step;
            if (at == n) return {node, step};
        }
        return {0, 0};
    }

    int64_t longest(const int32_t* end, int64_t high) const {
        int64_t low = 0;
        while (low < high) {
            int64_t middle = (low + high + 1) / 2;
            if (walk(end - middle, middle).second < 0)
                high = middle - 1;
            else
                low = middle;
        }
        return low;
    }

    Found follow(Index node, int64_t along, double most, double min_prob) {
        Found found;
        double prob = 1, sure = 1;
        while (double(found.tokens.size()) < most) {
            if (along == nodes_[node].length) {
                Index child = first(node);
                if (!child) break;
                sure = double(nodes_[child].count) / double(nodes_[node].count);
                prob *= sure;
                if (prob < min_prob) break;
                node = child;
                along = 0;
            } else {
                sure = 1;
            }
            found.add(token_at(nodes_[node], along), int32_t(found.tokens.size()) - 1, sure, prob);
            along++;
        }
        return found;
    }

    struct Branch {
        double prob, sure;
        int64_t order;  // of equal probabilities, the earlier pushed
        int32_t parent;
        Index node;
        int64_t along;

        bool operator<(const Branch& o) const {
            return prob != o.prob ? prob < o.prob : order > o.order;
        }
    };

    Found branches(Index node, int64_t along, double most, double min_prob) {
        Found found;
        std::priority_queue<Branch> heap;
        int64_t order = 0;
        auto push = [&](double prob, int32_t parent, Index at, int64_t along) {
            const Node& n = nodes_[at];
            if (along < n.length) {
                heap.push({prob, 1, order++, parent, at, along});
                return;
            }
            std::vector<Index> likely;
            auto sure = [&](Index c) { return double(nodes_[c].count) / double(n.count); };
            for (Index c = n.child; c; c = nodes_[c].next)
                if (prob * sure(c) >= min_prob) likely.push_back(c);
            std::sort(likely.begin(), likely.end(), [&](Index a, Index b) { return before(a, b); });
            for (Index c : likely) heap.push({prob * sure(c), sure(c), order++, parent, c, 0});
        };
        push(1, -1, node, along);
        while (!heap.empty() && double(found.tokens.size()) < most) {
            Branch top = heap.top();
            heap.pop();
            found.add(token_at(nodes_[top.node], top.along), top.parent, top.sure, top.prob);
            push(top.prob, int32_t(found.tokens.size()) - 1, top.node, top.along + 1);
        }
        return found;
    }
};

}  // namespace

extern "C" {

void* kvarn_tree_new(int64_t depth) { return new Tree(depth); }

void kvarn_tree_free(void* tree) { delete static_cast<Tree*>(tree); }

int64_t kvarn_tree_extend(void* tree, int64_t key, const int32_t* tokens, int64_t n) {
    return static_cast<Tree*>(tree)->extend(key, tokens, n);
}

void kvarn_tree_close(void* tree, int64_t key) { static_cast<Tree*>(tree)->close(key); }

int64_t kvarn_tree_remove(void* tree, int64_t key) { return static_cast<Tree*>(tree)->remove(key); }

int64_t kvarn_tree_count(void* tree, const int32_t* run, int64_t n) {
    return static_cast<Tree*>(tree)->count(run, n);
}

int64_t kvarn_tree_nodes(void* tree) { return static_cast<Tree*>(tree)->live(); }

// `how`: cap, factor, offset, min_prob, tree (0 or 1). Writes the draft, of at most `cap` tokens,
// and score and length of the match to `said`; returns the number of tokens.
int64_t kvarn_tree_speculate(
    void* tree, const int32_t* context, int64_t n, const double* how,
    int32_t* tokens, int32_t* parents, double* confidence, double* said
) {
    Found found = static_cast<Tree*>(tree)->speculate(
        context, n, {how[0], how[1], how[2], how[3], how[4] != 0}
    );
    std::copy(found.tokens.begin(), found.tokens.end(), tokens);
    std::copy(found.parents.begin(), found.parents.end(), parents);
    std::copy(found.confidence.begin(), found.confidence.end(), confidence);
    said[0] = found.score;
    said[1] = double(found.matched);
    return int64_t(found.tokens.size());
}

}
