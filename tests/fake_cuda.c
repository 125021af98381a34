// A driver without a GPU: its kernels are lists of numbers of inputs, scalars, outputs and elements,
// and add up inputs, scalars and the size of their grid.

#include <cuda.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  int32_t inputs, scalars, outputs, elements;
} Image;

static Image loaded[16];
int loads, launches, threads, shared, dynamic, relaxed, refuse, overlapped;
_Thread_local long context = 1;

CUresult cuGetErrorString(CUresult result, const char** text) {
  *text = result == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "other";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = (CUcontext)context;
  return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  CUstreamCaptureMode old = relaxed ? CU_STREAM_CAPTURE_MODE_RELAXED : CU_STREAM_CAPTURE_MODE_GLOBAL;
  relaxed = *mode == CU_STREAM_CAPTURE_MODE_RELAXED;
  *mode = old;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (!relaxed) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  memcpy(&loaded[loads], image, sizeof *loaded);
  *module = (CUmodule)&loaded[loads++];
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)module;
  return strcmp(name, "sum") ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (function && attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) dynamic = value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params,
                          void** extra) {
  Image* image = (Image*)function;
  if (refuse || config->hStream || extra) return CUDA_ERROR_INVALID_VALUE;
  ++launches;
  overlapped = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      overlapped = config->attrs[i].value.programmaticStreamSerializationAllowed;
    else
      return CUDA_ERROR_INVALID_VALUE;
  threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  shared = config->sharedMemBytes;
  int given = image->inputs + image->scalars;
  if (*(void**)params[given + image->outputs] || *(void**)params[given + image->outputs + 1])
    return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < image->elements; ++i) {
    float sum = (float)(config->gridDimX * config->gridDimY * config->gridDimZ);
    for (int k = 0; k < image->inputs; ++k) sum += (*(float**)params[k])[i];
    for (int k = 0; k < image->scalars; ++k)
      sum += k ? (float)*(int32_t*)params[image->inputs + k] : *(float*)params[image->inputs];
    for (int k = 0; k < image->outputs; ++k) (*(float**)params[given + k])[i] = sum + (float)k;
  }
  return CUDA_SUCCESS;
}
