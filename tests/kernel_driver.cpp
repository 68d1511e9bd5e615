// Runs programs that a test wrote to files, on every instruction set of this machine and on 1 and 2 threads, in memory
// of exactly the sizes that they ask for, under a compiler's sanitizers. Writes the logits of all runs.

#include <cstdio>
#include <cstdlib>

#include "kernel.cpp"

template <typename T>
struct Table {
    T *at;
    explicit Table(int64_t count) : at(static_cast<T *>(std::malloc(count * sizeof(T)))) {}
    Table(int64_t count, FILE *file) : Table(count) {
        if (std::fread(at, sizeof(T), count, file) != (size_t)count) std::abort();
    }
    ~Table() { std::free(at); }
};

// A file: lengths of ops, nonzeros, starts, floats, masks, images, of the arena and of the logits; then the first six.
static void run_file(const char *path, FILE *results) {
    FILE *file = std::fopen(path, "rb");
    if (!file) std::abort();
    int64_t n[8];
    if (std::fread(n, sizeof(int64_t), 8, file) != 8) std::abort();
    const Table<Op> ops(n[0], file);
    const Table<Nonzero> nonzeros(n[1], file);
    const Table<int32_t> starts(n[2], file);
    const Table<float> floats(n[3], file);
    const Table<int32_t> masks(n[4], file);
    const Table<float> images(n[5], file);
    std::fclose(file);
    for (int64_t threads = 1; threads <= 2; threads++) {
        void *group = atmc_start_threads(threads);
        for (int64_t i = 0; const char *set = atmc_instructions(i); i++) {
            const Table<float> arena(n[6]), logits(n[7]);
            for (int64_t at = 0; at < n[6]; at++) arena.at[at] = 1e30f;
            if (atmc_run(group, set, ops.at, n[0], arena.at, nonzeros.at, starts.at, floats.at, masks.at, images.at,
                         logits.at))
                std::abort();
            std::fwrite(logits.at, sizeof(float), n[7], results);
        }
        atmc_stop_threads(group);
    }
}

int main(int count, char **arguments) {
    FILE *results = std::fopen(arguments[1], "wb");
    for (int i = 2; i < count; i++) run_file(arguments[i], results);
    return results && !std::fclose(results) ? 0 : 1;
}
