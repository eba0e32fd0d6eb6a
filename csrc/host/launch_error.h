// What a kernel launch on the host throws where a GPU would hang, fault or compute garbage.
#pragma once

#include <stdexcept>
#include <string>

namespace pcfast::host {

// The values serve as exit status of test programs and as status codes of a C interface; no CUDA error has them.
enum class Fault : int {
  kDeadlock = 66,     // a barrier or warp operation that not all of its threads reach
  kMisaligned = 67,   // an address that the operation's width does not divide
  kNotShared = 68,    // an address outside the block's dynamic shared memory
  kEarlyChange = 69,  // the source of an asynchronous copy changed before the wait
  kTooLarge = 70,     // more threads than ThreadSanitizer can follow
};

class LaunchError : public std::runtime_error {
 public:
  LaunchError(Fault fault, const std::string& message) : std::runtime_error(message), fault_(fault) {}

  Fault fault() const { return fault_; }
  int status() const { return static_cast<int>(fault_); }

 private:
  Fault fault_;
};

}  // namespace pcfast::host
