// The C interface between the kernels and what calls them: pointers, sizes and streams in, a status out.
//
// No function throws, keeps a pointer after the work it put on the stream, or knows of Python or torch.
#pragma once

// Goes up with every change of this file, or of what a pointer in it points to. pcfast/backends/cuda/native.py expects the same.
#define PCFAST_ABI_VERSION 3

// A status is 0, a CUDA error (positive) or one of these.
#define PCFAST_SUCCESS 0
#define PCFAST_INVALID_ARGUMENT (-1)

#ifdef __cplusplus
extern "C" {
#endif

int pcfast_abi_version(void);

// In words; the text lives as long as the module.
const char* pcfast_error_text(int status);

// nvcc's names of what is compiled in, separated by spaces: "sm_80 sm_90a compute_90". Empty in a build for the CPU.
const char* pcfast_architectures(void);

// Versions are 1000 * major + 10 * minor, and 0 where there is no driver.
int pcfast_driver_version(int* version);
int pcfast_runtime_version(int* version);
int pcfast_device_count(int* count);
int pcfast_device_capability(int device, int* major, int* minor);

// One launch of the resident kernel. program, tensors and run point to the structs of resident/program.h, in host
// memory; the tensors' own pointers are to device memory. stream is a cudaStream_t.
int pcfast_resident(const void* program, const void* tensors, const void* run, int scalar_bytes, int threads,
                    void* stream);
// Bytes of those structs, for callers in another language.
void pcfast_resident_sizes(int* program, int* tensors, int* run);
// The sizes and codes that those structs count with, a line each: "kConvRows 8 5 4 1". The text lives as long as the module.
const char* pcfast_resident_constants(void);

#ifdef __cplusplus
}
#endif
