//! Compiles the C++ shim against the LibTorch that torch-sys was built with.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// The LibTorch that tch 0.24 is written for.
const WANTED: &str = "2.11.0";

fn main() {
    if let Err(message) = build() {
        // These fail the build by themselves; a panic or an exit code would add a page of what else was printed.
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn build() -> Result<(), String> {
    for path in ["cpp", "build.rs"] {
        println!("cargo:rerun-if-changed={path}");
    }
    for name in ["LIBTORCH", "LIBTORCH_INCLUDE", "LIBTORCH_LIB", "LIBTORCH_CXX11_ABI"] {
        println!("cargo:rerun-if-env-changed={name}");
    }

    // torch-sys names its `links` key `tch`; only its direct dependents are told.
    let lib = env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from).ok_or(
        "torch-sys does not say where LibTorch is: attn-torch has to depend on it directly",
    )?;
    let root = env::var_os("LIBTORCH_INCLUDE")
        .map(PathBuf::from)
        .or_else(|| lib.parent().map(Path::to_path_buf))
        .ok_or_else(|| format!("`{}` is no LibTorch library folder", lib.display()))?;
    let include = root.join("include");
    let built = header_version(&include)?;
    if built != WANTED {
        return Err(format!(
            "LibTorch in `{}` is {built}, tch 0.24 needs exactly {WANTED}\n\
             hint: unset LIBTORCH or point it at LibTorch {WANTED}, then run `scripts/setup_env.sh`",
            root.display()
        ));
    }
    println!("cargo:rustc-env=ATTN_LIBTORCH_BUILT={built}");

    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    let mut base = cc::Build::new();
    base.cpp(true)
        .std("c++17")
        .pic(true)
        .debug(false)
        .extra_warnings(true)
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str());
    // As system headers, so that warnings are about our files alone.
    for dir in [include.clone(), include.join("torch/csrc/api/include")] {
        base.flag("-isystem").flag(dir);
    }
    let compile = |build: &mut cc::Build, name: &str| {
        build.try_compile(name).map_err(|error| {
            format!("the C++ part of attn-torch does not compile: {error}\nhint: run `scripts/setup_env.sh`: it checks for a C++17 compiler and LibTorch {WANTED}")
        })
    };
    let mut shim = base.clone();
    // These files only forward calls: optimizing them would lengthen the build and speed up nothing.
    shim.opt_level(0);
    shim.files(
        ["autograd", "context", "list", "memory", "optim"].map(|name| format!("cpp/{name}.cpp")),
    );
    compile(&mut shim, "attn_torch_shim")?;
    // This one computes, on LibTorch's own threads, which are OpenMP's.
    let mut kernels = base.clone();
    kernels.opt_level(3).flag("-fopenmp").files(
        ["matvec", "attend", "decode", "performer", "vocabulary"]
            .map(|name| format!("cpp/{name}.cpp")),
    );
    compile(&mut kernels, "attn_torch_kernels")?;
    // Once for each set of instructions, of which the one that the processor has is taken when the program runs.
    let sets: &[(&str, &[&str])] = match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("x86_64") => &[("avx2", &["-mavx2", "-mfma"]), ("avx512", &["-mavx512f", "-mfma"])],
        _ => &[("plain", &[])],
    };
    for (name, flags) in sets {
        let mut set = base.clone();
        // A product and a sum in one instruction, which ISO C++ leaves apart.
        set.opt_level(3).flag("-ffp-contract=fast").flags(*flags).define("ATTN_ISA", *name);
        set.files(
            ["attend", "decode", "performer", "vocabulary"]
                .map(|name| format!("cpp/{name}_kernels.cpp")),
        );
        compile(&mut set, &format!("attn_torch_kernels_{name}"))?;
    }
    println!("cargo:rustc-link-lib=dylib=gomp");

    println!("cargo:rustc-link-search=native={}", lib.display());
    for name in ["torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib=dylib={name}");
    }
    Ok(())
}

/// The version that the headers state, such as `2.11.0`.
fn header_version(include: &Path) -> Result<String, String> {
    let missing = |what: &Path| {
        format!(
            "no LibTorch headers: `{}` is missing\nhint: run `scripts/setup_env.sh`",
            what.display()
        )
    };
    let tensor = include.join("ATen/ATen.h");
    if !tensor.exists() {
        return Err(missing(&tensor));
    }
    // 2.9 moved the numbers from the first file to the second, which the first includes.
    let files = ["torch/headeronly/version.h", "torch/csrc/api/include/torch/version.h"];
    let paths = files.map(|file| include.join(file));
    let text: String = paths.iter().filter_map(|path| fs::read_to_string(path).ok()).collect();
    let number = |part: &str| {
        let key = format!("#define TORCH_VERSION_{part} ");
        text.lines().find_map(|line| line.strip_prefix(&key)).map(str::trim)
    };
    match (number("MAJOR"), number("MINOR"), number("PATCH")) {
        (Some(major), Some(minor), Some(patch)) => Ok(format!("{major}.{minor}.{patch}")),
        _ => Err(missing(&paths[0])),
    }
}
