// Turns what a launch throws into a status and a message, as a C interface must.
#pragma once

#include <string>

#include "host/launch_error.h"

inline thread_local std::string last_error;

template <class Launch>
int status_of(const Launch& launch) {
  last_error.clear();
  try {
    return launch();
  } catch (const pcfast::host::LaunchError& error) {
    last_error = error.what();
    return error.status();
  }
}

extern "C" [[gnu::used]] inline const char* message() { return last_error.c_str(); }
