//! CUDA, loaded at run time: one binary serves machines with and without it.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

use tch::Device;

use crate::error::{Error, Result, first_line};
use crate::ffi;
use crate::settings::libtorch_path;

/// For the case that the library is there but something it needs is not.
const INSTALL: &str = "install LibTorch with CUDA: `scripts/setup_env.sh cuda`";
const DRIVER: &str = "install or update NVIDIA's driver, or use `--device cpu`";
const ORDER: &str = "call `attn_torch::load_cuda` before anything else asks about CUDA";

/// Loads LibTorch's CUDA half, once; later calls repeat the first answer.
///
/// A program linked against tch alone has only the CPU half, also on a machine with a GPU. This has to come before
/// anything else asks LibTorch about CUDA (`tch::Cuda::is_available`, a CUDA tensor): it asks itself once per process
/// and keeps the answer. [`device`] calls this when it has to.
///
/// The library is looked for beside the CPU half first, then on the loader's path. That it loads does not mean that
/// there is a GPU: see [`cuda_device_count`].
///
/// # Errors
///
/// [`Error::NoCuda`] with what is missing, and what to do.
pub fn load_cuda() -> Result<()> {
    static LOADED: OnceLock<std::result::Result<(), (String, &'static str)>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        load_library().map_err(|reason| (reason, INSTALL))?;
        let mut hooked = 0;
        // SAFETY: a place to write to.
        ffi::call("looking for CUDA", |err| unsafe { ffi::attn_cuda_hooked(&mut hooked, err) })
            .map_err(|error| (error.to_string(), INSTALL))?;
        match hooked {
            0 => Err((
                "LibTorch had decided that there is none before its CUDA half was loaded"
                    .to_owned(),
                ORDER,
            )),
            _ => Ok(()),
        }
    });
    loaded.clone().map_err(|(reason, hint)| Error::NoCuda { reason, hint })
}

fn load_library() -> std::result::Result<(), String> {
    const NAME: &str =
        if cfg!(target_os = "macos") { "libtorch_cuda.dylib" } else { "libtorch_cuda.so" };
    let beside = libtorch_path().map(|path| path.with_file_name(NAME)).filter(|path| path.exists());
    let path = beside.as_deref().unwrap_or(Path::new(NAME));
    // Global, so that its hooks find each other as if they had been linked; never closed, as they stay registered.
    open(path, libc::RTLD_NOW | libc::RTLD_GLOBAL).map(drop)
}

/// Opens a shared library for good.
fn open(path: &Path, flags: c_int) -> std::result::Result<*mut c_void, String> {
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| "a path with a zero byte".to_owned())?;
    // SAFETY: a terminated string. The initializers that run are those of LibTorch or the NVIDIA driver.
    let handle = unsafe { libc::dlopen(name.as_ptr(), flags) };
    if !handle.is_null() {
        return Ok(handle);
    }
    // SAFETY: after a failed call, null or a string that lasts until this thread's next call of its kind.
    let error = unsafe { libc::dlerror() };
    if error.is_null() {
        return Err(format!("`{}` does not load", path.display()));
    }
    // SAFETY: not null, terminated.
    Err(first_line(&unsafe { CStr::from_ptr(error) }.to_string_lossy()).to_owned())
}

/// The device that `name` stands for: `cpu`, `cuda` (the first), `cuda:N`, or `auto`.
///
/// `auto` is `cuda:0` where there is an NVIDIA driver with a GPU and LibTorch can use it, and the CPU otherwise; a GPU
/// that cannot be used is warned of. CUDA is loaded only for names that may need it.
///
/// # Errors
///
/// [`Error::DeviceName`] for any other name, [`Error::NoCuda`] where CUDA was asked for and cannot be used,
/// [`Error::CudaIndex`] where there is no such GPU.
///
/// ```
/// use tch::Device;
///
/// assert_eq!(attn_torch::device("cpu")?, Device::Cpu);
/// assert!(attn_torch::device("gpu").is_err());
/// # Ok::<(), attn_torch::Error>(())
/// ```
pub fn device(name: &str) -> Result<Device> {
    let unknown = || Error::DeviceName { name: name.to_owned() };
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" => return Ok(auto()),
        "cuda" => 0,
        _ => {
            let digits = name.strip_prefix("cuda:").ok_or_else(unknown)?;
            // `parse` would take a sign too.
            if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(unknown());
            }
            digits.parse().map_err(|_| unknown())?
        }
    };
    let n_devices = cuda_device_count()?;
    if index >= n_devices {
        return Err(Error::CudaIndex { index, n_devices });
    }
    Ok(Device::Cuda(index))
}

fn auto() -> Device {
    // Without a GPU, loading LibTorch's CUDA half would take time for nothing.
    match cuda_devices() {
        Ok(devices) if !devices.is_empty() => {}
        _ => return Device::Cpu,
    }
    match cuda_device_count() {
        Ok(_) => Device::Cuda(0),
        Err(error) => {
            tracing::warn!("there is a GPU, but it is left idle: {error}");
            Device::Cpu
        }
    }
}

/// How many GPUs LibTorch can use, at least one. Loads CUDA.
///
/// # Errors
///
/// [`Error::NoCuda`] where it can use none.
pub fn cuda_device_count() -> Result<usize> {
    // First, as without it a LibTorch with CUDA would be fetched in vain.
    let driver = cuda_driver_version()?;
    load_cuda()?;
    let (_, n_devices) = runtime()?;
    match usize::try_from(n_devices) {
        Ok(0) | Err(_) => {
            let reason = format!("LibTorch finds no GPU (the driver supports CUDA {driver})");
            Err(Error::NoCuda { reason, hint: DRIVER })
        }
        Ok(n_devices) => Ok(n_devices),
    }
}

fn runtime() -> Result<(i64, c_int)> {
    let (mut version, mut n_devices) = (0, 0);
    // SAFETY: two places to write to.
    ffi::call("asking about CUDA", |err| unsafe {
        ffi::attn_cuda_runtime(&mut version, &mut n_devices, err)
    })?;
    Ok((version, n_devices))
}

/// A version of CUDA, such as 13.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CudaVersion {
    /// Before the point.
    pub major: u32,
    /// After the point.
    pub minor: u32,
}

impl CudaVersion {
    /// From CUDA's own number, `1000 · major + 10 · minor`.
    fn from_number(number: i64) -> Self {
        let number = u32::try_from(number).unwrap_or_default();
        Self { major: number / 1000, minor: number % 1000 / 10 }
    }
}

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The CUDA that the loaded LibTorch brings. Loads CUDA, but needs no GPU.
///
/// # Errors
///
/// [`Error::NoCuda`] where LibTorch is without it.
pub fn cuda_runtime_version() -> Result<CudaVersion> {
    load_cuda()?;
    Ok(CudaVersion::from_number(runtime()?.0))
}

/// The newest CUDA that the installed driver supports. Needs no LibTorch with CUDA.
///
/// # Errors
///
/// [`Error::NoCuda`] without a driver.
pub fn cuda_driver_version() -> Result<CudaVersion> {
    let mut version = 0;
    driver()?.version(&mut version)?;
    Ok(CudaVersion::from_number(version.into()))
}

/// A GPU, as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaDevice {
    /// Its name, such as `NVIDIA A100-SXM4-80GB`.
    pub name: String,
    /// Its memory, in bytes.
    pub total_bytes: usize,
    /// Its generation, such as `(8, 0)`: bf16 matrix units from `(8, 0)` on.
    pub compute_capability: (i32, i32),
}

/// The GPUs of this machine, in the order of `cuda:N`. Needs no LibTorch with CUDA.
///
/// # Errors
///
/// [`Error::NoCuda`] without a driver, or where it refuses to answer.
pub fn cuda_devices() -> Result<Vec<CudaDevice>> {
    driver()?.devices()
}

/// Memory of one GPU, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaMemory {
    /// In tensors that are alive.
    pub allocated: usize,
    /// The most that was, since the start or [`reset_peak_cuda_memory`].
    pub peak_allocated: usize,
    /// Held by LibTorch, for tensors alive and to come.
    pub reserved: usize,
    /// The most that was.
    pub peak_reserved: usize,
    /// Free on the device, for any process.
    pub free: usize,
    /// On the device in all.
    pub total: usize,
}

/// The memory of `cuda:index`.
///
/// # Errors
///
/// [`Error::NoCuda`], [`Error::CudaIndex`].
pub fn cuda_memory(index: usize) -> Result<CudaMemory> {
    let code = checked_index(index)?;
    let mut bytes = [0i64; 6];
    // SAFETY: C++ writes six numbers.
    ffi::call("reading CUDA memory", |err| unsafe {
        ffi::attn_cuda_memory(code, bytes.as_mut_ptr(), err)
    })?;
    let [allocated, peak_allocated, reserved, peak_reserved, free, total] =
        bytes.map(|bytes| usize::try_from(bytes).unwrap_or_default());
    Ok(CudaMemory { allocated, peak_allocated, reserved, peak_reserved, free, total })
}

/// Starts the peaks of [`cuda_memory`] anew from what is in use now.
///
/// # Errors
///
/// [`Error::NoCuda`], [`Error::CudaIndex`].
pub fn reset_peak_cuda_memory(index: usize) -> Result<()> {
    let code = checked_index(index)?;
    // SAFETY: a plain number.
    ffi::call("resetting CUDA peaks", |err| unsafe { ffi::attn_cuda_reset_peak(code, err) })
}

fn checked_index(index: usize) -> Result<c_int> {
    let n_devices = cuda_device_count()?;
    match c_int::try_from(index) {
        Ok(code) if index < n_devices => Ok(code),
        _ => Err(Error::CudaIndex { index, n_devices }),
    }
}

/// The few functions of NVIDIA's driver that describe GPUs; present wherever a GPU can be used.
struct Driver {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    init: unsafe extern "C" fn(u32) -> c_int,
    count: unsafe extern "C" fn(*mut c_int) -> c_int,
    get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    name: unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int,
    total_mem: unsafe extern "C" fn(*mut usize, c_int) -> c_int,
    attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int,
}

fn driver() -> Result<&'static Driver> {
    static DRIVER_LIBRARY: OnceLock<std::result::Result<Driver, String>> = OnceLock::new();
    let opened = DRIVER_LIBRARY.get_or_init(|| {
        let library = open(Path::new("libcuda.so.1"), libc::RTLD_NOW | libc::RTLD_LOCAL)
            .map_err(|reason| format!("there is no NVIDIA driver ({reason})"))?;
        // SAFETY: the names and types are those of cuda.h; `cuDeviceTotalMem` took its `_v2` form in CUDA 3.2.
        unsafe {
            Ok(Driver {
                get_version: symbol(library, c"cuDriverGetVersion")?,
                init: symbol(library, c"cuInit")?,
                count: symbol(library, c"cuDeviceGetCount")?,
                get: symbol(library, c"cuDeviceGet")?,
                name: symbol(library, c"cuDeviceGetName")?,
                total_mem: symbol(library, c"cuDeviceTotalMem_v2")?,
                attribute: symbol(library, c"cuDeviceGetAttribute")?,
            })
        }
    });
    opened.as_ref().map_err(|reason| Error::NoCuda { reason: reason.clone(), hint: DRIVER })
}

/// A function of a library.
///
/// # Safety
///
/// `library` is from [`open`], and `F` is the type of the function called `name`.
unsafe fn symbol<F: Copy>(library: *mut c_void, name: &CStr) -> std::result::Result<F, String> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: an open library and a terminated string.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    if address.is_null() {
        return Err(format!("the NVIDIA driver has no `{}`", name.to_string_lossy()));
    }
    // SAFETY: by the caller, the function's type; pointers to functions and data are alike where `dlsym` exists.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

impl Driver {
    fn check(what: &str, code: c_int) -> Result<()> {
        match code {
            0 => Ok(()),
            _ => Err(Error::NoCuda {
                reason: format!("the driver failed in `{what}` with code {code}"),
                hint: DRIVER,
            }),
        }
    }

    fn version(&self, version: &mut c_int) -> Result<()> {
        // SAFETY: a place to write to; needs no `cuInit`.
        Self::check("cuDriverGetVersion", unsafe { (self.get_version)(version) })
    }

    fn devices(&self) -> Result<Vec<CudaDevice>> {
        let mut n_devices = 0;
        // SAFETY: no flags exist; may be called any number of times.
        let code = unsafe { (self.init)(0) };
        if code == 100 {
            return Ok(Vec::new()); // CUDA_ERROR_NO_DEVICE: none, or all hidden by CUDA_VISIBLE_DEVICES.
        }
        Self::check("cuInit", code)?;
        // SAFETY: a place to write to.
        Self::check("cuDeviceGetCount", unsafe { (self.count)(&mut n_devices) })?;
        (0..n_devices).map(|index| self.device(index)).collect()
    }

    fn device(&self, index: c_int) -> Result<CudaDevice> {
        const MAJOR: c_int = 75; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        const MINOR: c_int = 76;
        let (mut device, mut total_bytes, mut major, mut minor) = (0, 0, 0, 0);
        let mut name = [0 as c_char; 256];
        // SAFETY: places to write to, the name's with its length; `device` is what the driver gave.
        unsafe {
            Self::check("cuDeviceGet", (self.get)(&mut device, index))?;
            Self::check("cuDeviceGetName", (self.name)(name.as_mut_ptr(), 255, device))?;
            Self::check("cuDeviceTotalMem", (self.total_mem)(&mut total_bytes, device))?;
            Self::check("cuDeviceGetAttribute", (self.attribute)(&mut major, MAJOR, device))?;
            Self::check("cuDeviceGetAttribute", (self.attribute)(&mut minor, MINOR, device))?;
        }
        // SAFETY: the last byte was kept zero.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok(CudaDevice { name, total_bytes, compute_capability: (major, minor) })
    }
}
