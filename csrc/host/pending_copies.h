// The asynchronous copies of one thread. Bytes move at the latest moment that the GPU allows, the wait, and the
// target is NaN until then: a missing wait shows in the result.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

#include "launch_error.h"

namespace pcfast::host {

constexpr int kNaNByte = 0xFF;  // four of them are a NaN in float32, two in bfloat16

class PendingCopies {
 public:
  static constexpr std::size_t kMaxBytes = 16;

  // A null source means zeros.
  void issue(void* target, const void* source, std::size_t bytes) {
    Copy copy{target, source, bytes, committed_, {}};
    // Read now too: the sanitizers then name the line of the copy, not of the wait, for a bad source.
    if (source != nullptr) std::memcpy(copy.at_issue, source, bytes);
    // The GPU may write the target from here on, so this is also where ThreadSanitizer sees the first write.
    std::memset(target, kNaNByte, bytes);
    copies_.push_back(copy);
  }

  void commit() { ++committed_; }

  // Completes all committed groups but the newest `groups_left`.
  void wait(unsigned groups_left) {
    std::size_t done = 0;
    while (done < copies_.size() && copies_[done].group + groups_left < committed_) complete(copies_[done++]);
    copies_.erase(copies_.begin(), copies_.begin() + static_cast<std::ptrdiff_t>(done));
  }

 private:
  struct Copy {
    void* target;
    const void* source;
    std::size_t bytes;
    unsigned group;
    unsigned char at_issue[kMaxBytes];
  };

  static void complete(const Copy& copy) {
    if (copy.source == nullptr) {
      std::memset(copy.target, 0, copy.bytes);
      return;
    }
    if (std::memcmp(copy.source, copy.at_issue, copy.bytes) != 0) {
      throw LaunchError(Fault::kEarlyChange, "the source of an asynchronous copy changed before its copy_wait");
    }
    std::memcpy(copy.target, copy.source, copy.bytes);
  }

  std::vector<Copy> copies_;
  unsigned committed_ = 0;
};

}  // namespace pcfast::host
