// One launch of the resident kernel, read from a file; what it wrote goes to another. Both are test_sanitized.py's.
//
// Every tensor is an allocation of its own, of exactly its bytes: AddressSanitizer reports the first one past its end.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "abi.h"
#include "calls.h"
#include "resident/program.h"
#include "tile/platform.cuh"

namespace {

using namespace pcfast::resident;

struct Gap {
  int32_t first, bytes;  // of shared memory
};
std::vector<Gap> gaps;

constexpr int kTensors = sizeof(Tensors) / sizeof(void*);

class File {
 public:
  File(const char* path, const char* mode) : file_(std::fopen(path, mode)) {
    if (file_ == nullptr) std::abort();
  }
  ~File() { std::fclose(file_); }

  void read(void* to, std::size_t bytes) {
    if (std::fread(to, 1, bytes, file_) != bytes) std::abort();
  }
  template <class T>
  T read() {
    std::remove_const_t<T> value;
    read(&value, sizeof(T));
    return value;
  }
  void write(const void* from, std::size_t bytes) {
    if (std::fwrite(from, 1, bytes, file_) != bytes) std::abort();
  }

 private:
  std::FILE* file_;
};

}  // namespace

// For kernels into which a test has written the call: nothing may touch what lies between two arrays.
void poison_gaps(const void* shared) {
  for (const Gap& gap : gaps)
    pcfast::tile::poison_shared(static_cast<const char*>(shared) + gap.first, static_cast<std::size_t>(gap.bytes));
}

int main(int, char** arguments) {
  File in(arguments[1], "rb");
  const auto scalar_bytes = in.read<int32_t>(), threads = in.read<int32_t>();
  gaps.resize(static_cast<std::size_t>(in.read<int32_t>()));
  for (Gap& gap : gaps) gap = in.read<Gap>();
  const auto program = in.read<Program>();
  const auto run = in.read<RunParams>();
  std::vector<std::unique_ptr<unsigned char[]>> tensors(kTensors);
  std::vector<int64_t> bytes(kTensors);
  void* pointers[kTensors];
  for (int i = 0; i < kTensors; ++i) {
    bytes[i] = in.read<int64_t>();  // -1: none
    if (bytes[i] >= 0) {
      tensors[i].reset(new unsigned char[static_cast<std::size_t>(bytes[i])]);
      in.read(tensors[i].get(), static_cast<std::size_t>(bytes[i]));
    }
    pointers[i] = tensors[i].get();
  }

  const int status = status_of([&] { return pcfast_resident(&program, pointers, &run, scalar_bytes, threads, nullptr); });
  if (status != 0) {
    std::fprintf(stderr, "status %d: %s\n", status, message());
    return status;
  }
  File out(arguments[2], "wb");
  for (int i = 0; i < kTensors; ++i)
    if (bytes[i] >= 0) out.write(tensors[i].get(), static_cast<std::size_t>(bytes[i]));
  return 0;
}
