// Launches Triton kernels for XLA: handlers of the custom call "twinfold_triton".
//
// A program says in two attributes which kernel it launches (a key, under which Python has given its
// machine code) and on what grid; scalars are words of 8 bytes. A kernel takes pointers to its inputs,
// scalars, pointers to its outputs, and two pointers to scratch memory, which stay null. A call always
// launches the same on its stream, so XLA may capture it in a command buffer. A launch may begin while
// the one before it on its stream ends, if its kernel waits itself (foldcore/kernels/dependent.py).

#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#define MAX_ARGUMENTS 64
#define BUCKETS 1024
#define ALIGNMENT 16  // of arrays, which kernels are compiled to rely on
#define DEFAULT_SHARED (48 * 1024)  // what every kernel may use without asking

typedef struct Loaded {  // a kernel in one device's context
  CUcontext context;
  CUfunction function;
  struct Loaded* next;
} Loaded;

typedef struct Kernel {
  char *key, *name;
  void* image;
  uint32_t threads, shared, overlapped;
  Loaded* loaded;
  struct Kernel* next;
} Kernel;

static Kernel* buckets[BUCKETS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // of the kernels and what is loaded of them

static struct {
  CUresult (*error)(CUresult, const char**);
  CUresult (*context)(CUcontext*);
  CUresult (*capture_mode)(CUstreamCaptureMode*);
  CUresult (*load)(CUmodule*, const void*);
  CUresult (*function)(CUfunction*, CUmodule, const char*);
  CUresult (*attribute)(CUfunction, CUfunction_attribute, int);
  CUresult (*launch)(const CUlaunchConfig*, CUfunction, void**, void**);
} cuda;

static Kernel** place(const char* key, size_t length) {
  uint32_t hash = 2166136261u;
  for (size_t i = 0; i < length; ++i) hash = (hash ^ (unsigned char)key[i]) * 16777619u;
  Kernel** found = &buckets[hash % BUCKETS];
  while (*found && (strlen((*found)->key) != length || memcmp((*found)->key, key, length)))
    found = &(*found)->next;
  return found;
}

// Finds CUDA's driver; NULL, or what is missing.
const char* twinfold_open(const char* library) {
  void* driver = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!driver) return dlerror();
  const char* names[] = {"cuGetErrorString",    "cuCtxGetCurrent",    "cuThreadExchangeStreamCaptureMode",
                         "cuModuleLoadData",    "cuModuleGetFunction", "cuFuncSetAttribute",
                         "cuLaunchKernelEx"};
  void** found = (void**)&cuda;
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i)
    if (!(found[i] = dlsym(driver, names[i]))) return names[i];
  return NULL;
}

// Makes a kernel known; a key that is known already keeps its kernel. Not zero: there is no memory.
int twinfold_add(const char* key, const char* name, const void* image, size_t size, uint32_t threads,
                 uint32_t shared, uint32_t overlapped) {
  pthread_mutex_lock(&lock);
  int known = *place(key, strlen(key)) != NULL;
  pthread_mutex_unlock(&lock);
  if (known) return 0;
  Kernel* kernel = calloc(1, sizeof *kernel);
  void* copy = malloc(size);
  if (!kernel || !copy || !(kernel->key = strdup(key)) || !(kernel->name = strdup(name))) return 1;
  kernel->image = memcpy(copy, image, size);
  kernel->threads = threads;
  kernel->shared = shared;
  kernel->overlapped = overlapped;
  pthread_mutex_lock(&lock);
  Kernel** free_place = place(key, strlen(key));
  if (!*free_place) *free_place = kernel;
  pthread_mutex_unlock(&lock);
  return 0;
}

static XLA_FFI_Error* fail(const XLA_FFI_CallFrame* frame, XLA_FFI_Error_Code code, const char* format,
                           ...) {
  char message[1024];
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
  return frame->api->XLA_FFI_Error_Create(&args);
}

static const char* reason(CUresult result) {
  const char* text = NULL;
  return cuda.error(result, &text) == CUDA_SUCCESS && text ? text : "unknown error";
}

static const void* attribute(const XLA_FFI_CallFrame* frame, const char* name, XLA_FFI_AttrType type) {
  const XLA_FFI_Attrs* attrs = &frame->attrs;
  for (int64_t i = 0; i < attrs->size; ++i)
    if (attrs->types[i] == type && attrs->names[i]->len == strlen(name) &&
        !memcmp(attrs->names[i]->ptr, name, strlen(name)))
      return attrs->attrs[i];
  return NULL;
}

// Puts the kernel into the context. Under capture CUDA refuses that, unless asked to look away.
static CUresult load(Kernel* kernel, CUcontext context, CUfunction* function) {
  CUmodule module;
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  CUresult result = cuda.capture_mode(&mode);
  if (result) return result;
  if (!(result = cuda.load(&module, kernel->image)))
    result = cuda.function(function, module, kernel->name);
  if (!result && kernel->shared > DEFAULT_SHARED)
    result = cuda.attribute(*function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                            (int)kernel->shared);
  cuda.capture_mode(&mode);
  Loaded* loaded = result ? NULL : malloc(sizeof *loaded);
  if (!loaded) return result ? result : CUDA_ERROR_OUT_OF_MEMORY;
  *loaded = (Loaded){context, *function, kernel->loaded};
  kernel->loaded = loaded;
  return CUDA_SUCCESS;
}

// The kernel of a call, loaded on the current device.
static XLA_FFI_Error* find(const XLA_FFI_CallFrame* frame, Kernel** kernel, CUfunction* function) {
  const XLA_FFI_ByteSpan* key = attribute(frame, "kernel", XLA_FFI_AttrType_STRING);
  if (!key) return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "a call names no Triton kernel");
  CUcontext context = NULL;  // XLA has made its device's current, at the latest to execute
  CUresult result = cuda.context(&context);
  if (!context && frame->stage == XLA_FFI_ExecutionStage_INITIALIZE) return NULL;
  pthread_mutex_lock(&lock);
  *kernel = *place(key->ptr, key->len);
  Loaded* loaded = *kernel ? (*kernel)->loaded : NULL;
  while (loaded && loaded->context != context) loaded = loaded->next;
  if (loaded)
    *function = loaded->function;
  else if (*kernel && !result)
    result = context ? load(*kernel, context, function) : CUDA_ERROR_INVALID_CONTEXT;
  pthread_mutex_unlock(&lock);
  if (!*kernel)
    return fail(frame, XLA_FFI_Error_Code_NOT_FOUND,
                "the Triton kernel %.*s is not compiled, although the program that launches it is: "
                "delete JAX's compilation cache and start again",
                (int)key->len, key->ptr);
  if (result)
    return fail(frame, XLA_FFI_Error_Code_INTERNAL, "cannot load the Triton kernel %.*s: %s",
                (int)key->len, key->ptr, reason(result));
  return NULL;
}

// XLA asks each handler for its version and its traits.
static int answer(const XLA_FFI_CallFrame* frame) {
  if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata* metadata = ((XLA_FFI_Metadata_Extension*)frame->extension_start)->metadata;
  metadata->api_version = (XLA_FFI_Api_Version){XLA_FFI_Api_Version_STRUCT_SIZE, NULL,
                                                XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  metadata->traits = XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE;
  metadata->state_type_id.type_id = 0;
  return 1;
}

static XLA_FFI_Error* stream_of(const XLA_FFI_CallFrame* frame, CUstream* stream) {
#ifdef WITHOUT_STREAMS  // XLA has none on a CPU, where tests run
  (void)frame;
  *stream = NULL;
  return NULL;
#else
  XLA_FFI_Stream_Get_Args args = {XLA_FFI_Stream_Get_Args_STRUCT_SIZE, NULL, frame->ctx, NULL};
  XLA_FFI_Error* error = frame->api->XLA_FFI_Stream_Get(&args);
  *stream = args.stream;
  return error;
#endif
}

static CUresult launch(const Kernel* kernel, CUfunction function, const int32_t* grid, CUstream stream,
                       void** params) {
  CUlaunchAttribute overlapped = {.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                                  .value.programmaticStreamSerializationAllowed = 1};
  CUlaunchConfig config = {.gridDimX = grid[0], .gridDimY = grid[1], .gridDimZ = grid[2],
                           .blockDimX = kernel->threads, .blockDimY = 1, .blockDimZ = 1,
                           .sharedMemBytes = kernel->shared, .hStream = stream,
                           .attrs = &overlapped, .numAttrs = kernel->overlapped};
  return cuda.launch(&config, function, params, NULL);
}

// Before a run: loads the kernel, so that nothing is loaded while XLA captures the launch.
XLA_FFI_Error* twinfold_initialize(XLA_FFI_CallFrame* frame) {
  Kernel* kernel;
  CUfunction function;
  return answer(frame) ? NULL : find(frame, &kernel, &function);
}

// Launches the kernel on the stream of the call.
XLA_FFI_Error* twinfold_execute(XLA_FFI_CallFrame* frame) {
  if (answer(frame)) return NULL;
  const XLA_FFI_Array* grid = attribute(frame, "grid", XLA_FFI_AttrType_ARRAY);
  const XLA_FFI_Array* scalars = attribute(frame, "scalars", XLA_FFI_AttrType_ARRAY);
  size_t words = scalars ? scalars->size : 0;
  int64_t count = frame->args.size + frame->rets.size + (int64_t)words + 2;
  if (!grid || grid->dtype != XLA_FFI_DataType_S32 || grid->size != 3 || count > MAX_ARGUMENTS ||
      (scalars && scalars->dtype != XLA_FFI_DataType_S64))
    return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, "a Triton kernel is called wrongly");
  void *values[MAX_ARGUMENTS] = {NULL}, *params[MAX_ARGUMENTS];  // those past the outputs stay null
  size_t n = 0;
  for (int64_t i = 0; i < frame->args.size; ++i)
    values[n++] = ((XLA_FFI_Buffer*)frame->args.args[i])->data;
  if (words) memcpy(values + n, scalars->data, words * sizeof *values);
  n += words;
  for (int64_t i = 0; i < frame->rets.size; ++i)
    values[n++] = ((XLA_FFI_Buffer*)frame->rets.rets[i])->data;
  for (size_t i = 0; i < n + 2; ++i) params[i] = &values[i];
  for (size_t i = 0; i < n; ++i)
    if ((i < (size_t)frame->args.size || i >= n - frame->rets.size) && (uintptr_t)values[i] % ALIGNMENT)
      return fail(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT,
                  "array %zu of a Triton kernel is at no multiple of %d bytes, as a slice of another: "
                  "put jax.lax.optimization_barrier around the slice",
                  i, ALIGNMENT);
  Kernel* kernel;
  CUfunction function;
  CUstream stream;
  XLA_FFI_Error* error = find(frame, &kernel, &function);
  if (error || (error = stream_of(frame, &stream))) return error;
  CUresult result = launch(kernel, function, grid->data, stream, params);
  if (!result) return NULL;
  return fail(frame, XLA_FFI_Error_Code_INTERNAL, "cannot launch the Triton kernel %s: %s", kernel->key,
              reason(result));
}
