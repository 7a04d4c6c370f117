//! The border to C++: declarations, lists of tensors, errors.

use std::borrow::Borrow;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{self, NonNull};

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::error::{Error, Result, first_line};

/// A C++ `std::vector<at::Tensor>`.
#[repr(C)]
pub(crate) struct RawList {
    _opaque: [u8; 0],
}

/// Where a failed call leaves its message.
pub(crate) type ErrorSlot = *mut *mut c_char;

/// A Rust object and how C++ calls it.
#[repr(C)]
pub(crate) struct Callbacks {
    pub(crate) data: *mut c_void,
    pub(crate) forward:
        extern "C" fn(*mut c_void, *const RawList, *mut RawList, *mut RawList, ErrorSlot) -> c_int,
    pub(crate) backward: extern "C" fn(
        *mut c_void,
        *const RawList,
        *const RawList,
        *mut RawList,
        ErrorSlot,
    ) -> c_int,
    pub(crate) drop: extern "C" fn(*mut c_void),
}

unsafe extern "C" {
    fn attn_list_new() -> *mut RawList;
    fn attn_list_free(list: *mut RawList);
    fn attn_list_push(list: *mut RawList, tensor: *const C_tensor, err: ErrorSlot) -> c_int;
    fn attn_list_len(list: *const RawList) -> usize;
    fn attn_list_get(
        list: *const RawList,
        index: usize,
        out: *mut *mut C_tensor,
        err: ErrorSlot,
    ) -> c_int;

    pub(crate) fn attn_from_blob(
        data: *mut c_void,
        size: *const i64,
        n_dims: usize,
        kind: c_int,
        owner: *mut c_void,
        drop: extern "C" fn(*mut c_void),
        out: *mut *mut C_tensor,
        err: ErrorSlot,
    ) -> c_int;

    pub(crate) fn attn_apply(
        inputs: *const RawList,
        callbacks: Callbacks,
        outputs: *mut RawList,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_backward(
        outputs: *const RawList,
        grads: *const RawList,
        keep_graph: c_int,
        create_graph: c_int,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_grad(
        outputs: *const RawList,
        grads: *const RawList,
        inputs: *const RawList,
        keep_graph: c_int,
        create_graph: c_int,
        input_grads: *mut RawList,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_take_grads(
        leaves: *const RawList,
        grads: *mut RawList,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_nested_backward_allowed(allowed: *mut c_int, err: ErrorSlot) -> c_int;

    pub(crate) fn attn_fused_adamw(
        params: *mut RawList,
        grads: *mut RawList,
        m: *mut RawList,
        v: *mut RawList,
        steps: *mut RawList,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_norms(tensors: *const RawList, norms: *mut RawList, err: ErrorSlot)
    -> c_int;
    pub(crate) fn attn_scale(tensors: *mut RawList, factor: f64, err: ErrorSlot) -> c_int;

    pub(crate) fn attn_matvec(
        matrix: *const C_tensor,
        x: *const C_tensor,
        bias: *const C_tensor,
        out: *mut *mut C_tensor,
        err: ErrorSlot,
    ) -> c_int;

    pub(crate) fn attn_decode(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        keep: *const C_tensor,
        scale: f64,
        out: *mut *mut C_tensor,
        err: ErrorSlot,
    ) -> c_int;

    pub(crate) fn attn_read_logits(
        logits: *const C_tensor,
        p: *const C_tensor,
        targets: *const C_tensor,
        out: *mut *mut C_tensor,
        err: ErrorSlot,
    ) -> c_int;

    pub(crate) fn attn_count_memory(err: ErrorSlot) -> c_int;
    pub(crate) fn attn_counted_memory(now: *mut i64, most: *mut i64);
    pub(crate) fn attn_reset_peak_memory();

    pub(crate) fn attn_attends() -> c_int;
    pub(crate) fn attn_attend(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        lo: *const C_tensor,
        hi: *const C_tensor,
        choices: *const C_tensor,
        first: i64,
        block: i64,
        scale: f64,
        out: *mut RawList,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_attend_backward(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        lo: *const C_tensor,
        hi: *const C_tensor,
        choices: *const C_tensor,
        first: i64,
        block: i64,
        scale: f64,
        z: *const C_tensor,
        lse: *const C_tensor,
        grad: *const C_tensor,
        out: *mut RawList,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_performer(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        omega: *const C_tensor,
        keep: *const C_tensor,
        scale: f64,
        eps: f64,
        out: *mut RawList,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_performer_backward(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        omega: *const C_tensor,
        keep: *const C_tensor,
        scale: f64,
        eps: f64,
        z: *const C_tensor,
        total: *const C_tensor,
        grad: *const C_tensor,
        out: *mut RawList,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_choose_blocks(
        q: *const C_tensor,
        k: *const C_tensor,
        hi: *const C_tensor,
        lse: *const C_tensor,
        own: *const C_tensor,
        end: *const C_tensor,
        scale: f64,
        reach: i64,
        per_block: i64,
        n_blocks: i64,
        n_initial: i64,
        n_local: i64,
        n_chosen: i64,
        out: *mut *mut C_tensor,
        err: ErrorSlot,
    ) -> c_int;

    pub(crate) fn attn_rng_get(
        device: c_int,
        index: c_int,
        out: *mut *mut C_tensor,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_rng_set(
        device: c_int,
        index: c_int,
        state: *const C_tensor,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_autocast_get(
        device: c_int,
        enabled: *mut c_int,
        kind: *mut c_int,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_autocast_set(
        device: c_int,
        enabled: c_int,
        kind: c_int,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_autocast_enter();
    pub(crate) fn attn_autocast_exit();
    pub(crate) fn attn_inference_enter() -> *mut c_void;
    pub(crate) fn attn_inference_exit(guard: *mut c_void);
    pub(crate) fn attn_is_inference(tensor: *const C_tensor) -> c_int;

    pub(crate) fn attn_sdp_set(
        flash: c_int,
        mem_efficient: c_int,
        math: c_int,
        cudnn: c_int,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_sdp_get(flags: *mut c_int, err: ErrorSlot) -> c_int;
    pub(crate) fn attn_set_deterministic(on: c_int, err: ErrorSlot) -> c_int;
    pub(crate) fn attn_is_deterministic() -> c_int;
    pub(crate) fn attn_set_tf32(on: c_int, err: ErrorSlot) -> c_int;
    pub(crate) fn attn_tf32(on: *mut c_int, err: ErrorSlot) -> c_int;

    pub(crate) fn attn_cuda_hooked(hooked: *mut c_int, err: ErrorSlot) -> c_int;
    pub(crate) fn attn_cuda_runtime(
        version: *mut i64,
        n_devices: *mut c_int,
        err: ErrorSlot,
    ) -> c_int;
    pub(crate) fn attn_cuda_memory(index: c_int, bytes: *mut i64, err: ErrorSlot) -> c_int;
    pub(crate) fn attn_cuda_reset_peak(index: c_int, err: ErrorSlot) -> c_int;
    pub(crate) fn attn_show_config(out: *mut *mut c_char, err: ErrorSlot) -> c_int;
    pub(crate) fn attn_library_path() -> *mut c_char;
}

/// Runs a call of the shim; its message, if it fails, becomes an error.
pub(crate) fn call(doing: &'static str, run: impl FnOnce(ErrorSlot) -> c_int) -> Result<()> {
    let mut message: *mut c_char = ptr::null_mut();
    if run(&mut message) == 0 {
        return Ok(());
    }
    // SAFETY: a failed call leaves null or a string of `strdup` that nobody else holds.
    let message = unsafe { take_string(message) }.unwrap_or_default();
    Err(Error::Torch { doing, message: first_line(&message).to_owned() })
}

/// Copies and frees a string that C++ made; `None` for null.
///
/// # Safety
///
/// `text` is null, or a C string from `malloc` that nobody else holds.
pub(crate) unsafe fn take_string(text: *mut c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: by the caller, a terminated string, which is copied before it is freed.
    let copy = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: by the caller, from `malloc` and ours alone.
    unsafe { libc::free(text.cast()) };
    Some(copy)
}

/// Takes over a tensor that the shim made; `None` for null, which stands for undefined.
///
/// # Safety
///
/// `tensor` is null, or an `at::Tensor` from `new` that nobody else holds.
pub(crate) unsafe fn take_tensor(tensor: *mut C_tensor) -> Option<Tensor> {
    // SAFETY: by the caller, ours alone, so that tch may free it.
    (!tensor.is_null()).then(|| unsafe { Tensor::from_ptr(tensor) })
}

/// A list of tensors that C++ reads and writes.
pub(crate) struct List(NonNull<RawList>);

impl List {
    pub(crate) fn new() -> Self {
        // SAFETY: takes nothing; the result is ours.
        let raw = unsafe { attn_list_new() };
        Self(NonNull::new(raw).expect("`new` does not return null"))
    }

    pub(crate) fn of<T: Borrow<Tensor>>(tensors: &[T]) -> Result<Self> {
        let list = Self::new();
        for tensor in tensors {
            // SAFETY: the list is ours alone.
            unsafe { push(list.0.as_ptr(), Some(tensor.borrow())) }?;
        }
        Ok(list)
    }

    pub(crate) fn as_ptr(&self) -> *const RawList {
        self.0.as_ptr()
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut RawList {
        self.0.as_ptr()
    }

    /// The tensors, `None` where undefined.
    pub(crate) fn to_tensors(&self) -> Result<Vec<Option<Tensor>>> {
        // SAFETY: the list is ours and alive.
        unsafe { tensors(self.0.as_ptr()) }
    }

    /// The tensors, all of which the caller knows to be defined.
    pub(crate) fn to_defined(&self, doing: &'static str) -> Result<Vec<Tensor>> {
        let undefined =
            || Error::Torch { doing, message: "a tensor came back undefined".to_owned() };
        self.to_tensors()?.into_iter().map(|tensor| tensor.ok_or_else(undefined)).collect()
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: from `attn_list_new`, freed once.
        unsafe { attn_list_free(self.0.as_ptr()) }
    }
}

/// Appends a tensor; `None` is kept as an undefined one.
///
/// # Safety
///
/// `list` is alive and nobody else uses it.
pub(crate) unsafe fn push(list: *mut RawList, tensor: Option<&Tensor>) -> Result<()> {
    let tensor = tensor.map_or(ptr::null(), Tensor::as_ptr);
    // SAFETY: the list by the caller; the tensor is borrowed and C++ copies its handle.
    call("listing tensors", |err| unsafe { attn_list_push(list, tensor, err) })
}

/// The tensors of a list, `None` where undefined.
///
/// # Safety
///
/// `list` is alive and nobody writes to it.
pub(crate) unsafe fn tensors(list: *const RawList) -> Result<Vec<Option<Tensor>>> {
    // SAFETY: by the caller.
    let len = unsafe { attn_list_len(list) };
    let get = |index| {
        let mut out = ptr::null_mut();
        // SAFETY: the list by the caller; the index is checked on the other side.
        call("reading a list of tensors", |err| unsafe {
            attn_list_get(list, index, &mut out, err)
        })?;
        // SAFETY: a successful call gives null or a handle of its own.
        Ok(unsafe { take_tensor(out) })
    };
    (0..len).map(get).collect()
}

/// LibTorch's `c10::DeviceType` and index.
pub(crate) fn device_code(doing: &'static str, device: Device) -> Result<(c_int, c_int)> {
    match device {
        Device::Cpu => Ok((0, -1)),
        Device::Cuda(index) => match c_int::try_from(index) {
            Ok(index) => Ok((1, index)),
            Err(_) => Err(Error::CudaIndex { index, n_devices: 0 }),
        },
        Device::Mps | Device::Vulkan => Err(Error::Device { doing, device }),
    }
}

/// LibTorch's `c10::ScalarType`, and the bytes of one element.
pub(crate) fn kind_code(kind: Kind) -> Option<(c_int, usize)> {
    match kind {
        Kind::Uint8 => Some((0, 1)),
        Kind::Int8 => Some((1, 1)),
        Kind::Int16 => Some((2, 2)),
        Kind::Int => Some((3, 4)),
        Kind::Int64 => Some((4, 8)),
        Kind::Half => Some((5, 2)),
        Kind::Float => Some((6, 4)),
        Kind::Double => Some((7, 8)),
        Kind::BFloat16 => Some((15, 2)),
        Kind::Float8e5m2 => Some((23, 1)),
        Kind::Float8e4m3fn => Some((24, 1)),
        _ => None,
    }
}
