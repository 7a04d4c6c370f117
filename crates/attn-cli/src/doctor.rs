//! `attn doctor`: whether this machine and this installation are fit to run, and what to fix where they are not.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    thread,
    time::Instant,
};

use anyhow::Result;
use attn_data::hub::HubConfig;
use tch::{Device, Kind, Tensor};

const GIB: u64 = 1 << 30;

/// Prints one line per check. True where nothing failed; warnings do not count.
pub(crate) fn run(out: &mut dyn Write) -> Result<bool> {
    let mut healthy = true;
    let mut print = |checks: Vec<Check>| -> Result<()> {
        for check in checks {
            healthy &= check.verdict != Verdict::Fail;
            writeln!(out, "{check}")?;
        }
        out.flush()?; // The next group may take a while.
        Ok(())
    };
    print(versions())?;
    print(processor())?;
    // Before any device is used: LibTorch decides once per process whether there is CUDA.
    let (gpus, devices) = gpus();
    print(gpus)?;
    print(devices.into_iter().map(arithmetic).collect())?;
    print(hub(&HubConfig::from_env()))?;
    print(vec![folder("folder", &env::current_dir()?, "run where you may write, or name --out")])?;
    Ok(healthy)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One line of the report.
#[derive(Debug)]
struct Check {
    verdict: Verdict,
    about: String,
    found: String,
    /// What to do; present unless all is well.
    fix: Option<String>,
}

impl Check {
    fn ok(about: &str, found: impl Into<String>) -> Self {
        Self { verdict: Verdict::Ok, about: about.to_owned(), found: found.into(), fix: None }
    }

    fn warn(about: &str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warn, fix: Some(fix.into()), ..Self::ok(about, found) }
    }

    fn fail(about: &str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, fix: Some(fix.into()), ..Self::ok(about, found) }
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        write!(f, "{verdict:<5} {:<10} {}", self.about, one_line(&self.found))?;
        match &self.fix {
            Some(fix) => write!(f, "; fix: {}", one_line(fix)),
            None => Ok(()),
        }
    }
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// An error of ours as what was found and what to do about it.
fn explain(error: &dyn std::error::Error, otherwise: &str) -> (String, String) {
    let message = error.to_string();
    match message.split_once("\nhint: ") {
        Some((found, hint)) => (found.to_owned(), hint.to_owned()),
        None => (message, otherwise.to_owned()),
    }
}

fn versions() -> Vec<Check> {
    let (os, arch) = (env::consts::OS, env::consts::ARCH);
    let profile = if cfg!(debug_assertions) { "dev" } else { "release" };
    let attn = format!("{} ({profile} build, {arch} {os})", env!("CARGO_PKG_VERSION"));
    let loaded = attn_torch::libtorch_version().map_err(|error| error.to_string());
    let path = attn_torch::libtorch_path().map_or_else(|| "?".into(), |path| real(&path));
    vec![
        Check::ok("attn", attn),
        libtorch(loaded, attn_torch::LIBTORCH_BUILT, attn_torch::LIBTORCH_WANTED, &path),
    ]
}

fn libtorch(
    loaded: std::result::Result<String, String>,
    built: &str,
    wanted: &str,
    path: &Path,
) -> Check {
    let about = "LibTorch";
    let rebuild = "run `scripts/setup_env.sh`, then `cargo clean -p torch-sys -p attn-torch`";
    match loaded {
        Ok(loaded) if loaded == wanted && built == wanted => Check::ok(
            about,
            format!("{loaded} loaded, built against and wanted; from {}", path.display()),
        ),
        Ok(loaded) => {
            let path = path.display();
            Check::fail(
                about,
                format!(
                    "{loaded} is loaded from {path}, {built} was built against, {wanted} is wanted"
                ),
                rebuild,
            )
        }
        Err(error) => Check::fail(about, error, rebuild),
    }
}

fn processor() -> Vec<Check> {
    let n_cores = thread::available_parallelism().map_or(1, |n| n.get());
    let (intra, inter) = (tch::get_num_threads(), tch::get_num_interop_threads());
    let mut checks = vec![threads(n_cores, intra, inter)];
    if let Ok(info) = fs::read_to_string("/proc/cpuinfo") {
        checks.push(features(&info));
    }
    checks
}

fn threads(n_cores: usize, intra: i32, inter: i32) -> Check {
    let found = format!("{intra} within an operation, {inter} between operations, {n_cores} cores");
    match usize::try_from(intra) {
        Ok(intra) if intra <= n_cores => Check::ok("threads", found),
        _ => Check::warn("threads", found, format!("set OMP_NUM_THREADS to at most {n_cores}")),
    }
}

/// The flag of a processor with matrix units for bf16.
const BF16_UNITS: &str = "amx_bf16";

fn field<'a>(cpuinfo: &'a str, key: &str) -> Option<&'a str> {
    let value = |line: &'a str| Some(line.strip_prefix(key)?.split_once(':')?.1.trim());
    cpuinfo.lines().find_map(value)
}

fn flags(cpuinfo: &str) -> &str {
    field(cpuinfo, "flags").or_else(|| field(cpuinfo, "Features")).unwrap_or_default()
}

/// Whether this processor multiplies bf16 faster than f32.
pub(crate) fn has_bf16_units() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    flags(&cpuinfo).split(' ').any(|flag| flag == BF16_UNITS)
}

/// What decides which kind is fast: bf16 without matrix units for it is slower than f32.
fn features(cpuinfo: &str) -> Check {
    let model = field(cpuinfo, "model name").unwrap_or(env::consts::ARCH);
    let flags = flags(cpuinfo);
    let known = ["avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "bf16", "sve"];
    let has: Vec<&str> = flags.split(' ').filter(|flag| known.contains(flag)).collect();
    let advice = match has.contains(&BF16_UNITS) {
        true => "train.precision = \"bf16\" is fast here",
        false => "without amx_bf16: train in f32",
    };
    let has = if has.is_empty() { "no vector units that matter".to_owned() } else { has.join(" ") };
    Check::ok("CPU", format!("{model}: {has} ({advice})"))
}

/// What there is of CUDA, and the devices that can be used, the CPU first.
fn gpus() -> (Vec<Check>, Vec<Device>) {
    let config = attn_torch::libtorch_config().unwrap_or_default();
    let built_for =
        config.split([',', ' ']).find_map(|pair| pair.strip_prefix("CUDA_VERSION=")).map(str::trim);
    let built_for = built_for.map_or("LibTorch is built without CUDA".to_owned(), |version| {
        format!("LibTorch is built for CUDA {version}")
    });
    let mut devices = vec![Device::Cpu];

    let Ok(driver) = attn_torch::cuda_driver_version() else {
        let found = format!("no NVIDIA driver, so the CPU alone is used ({built_for})");
        return (vec![Check::ok("CUDA", found)], devices);
    };
    let mut checks = Vec::new();
    let names = match attn_torch::cuda_devices() {
        Ok(gpus) => gpus,
        Err(error) => {
            let (found, fix) = explain(&error, "update NVIDIA's driver");
            return (vec![Check::fail("CUDA", found, fix)], devices);
        }
    };
    let found = format!("driver for CUDA up to {driver}, {} GPU(s); {built_for}", names.len());
    if names.is_empty() {
        checks.push(Check::warn("CUDA", found, "check CUDA_VISIBLE_DEVICES"));
        return (checks, devices);
    }
    match attn_torch::cuda_device_count().and_then(|n| Ok((n, attn_torch::cuda_runtime_version()?)))
    {
        Ok((n_devices, runtime)) => {
            checks.push(Check::ok("CUDA", format!("{found}, {runtime} is loaded")));
            devices.extend((0..n_devices).map(Device::Cuda));
        }
        Err(error) => {
            let (problem, fix) = explain(&error, "run `scripts/setup_env.sh cuda`");
            checks.push(Check::fail(
                "CUDA",
                format!("{found}, but the GPU is left idle: {problem}"),
                fix,
            ));
        }
    }
    for (index, gpu) in names.iter().enumerate() {
        let (major, minor) = gpu.compute_capability;
        let gib = gpu.total_bytes as u64 / GIB;
        let found = format!("{}, {gib} GiB, compute capability {major}.{minor}", gpu.name);
        checks.push(Check::ok(&format!("cuda:{index}"), found));
    }
    (checks, devices)
}

/// A matrix product and a gradient whose every number is known.
fn arithmetic(device: Device) -> Check {
    let about = match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    };
    let start = Instant::now();
    match compute(device) {
        Ok(()) => {
            let elapsed_ms = start.elapsed().as_secs_f64() * 1e3;
            Check::ok(
                &about,
                format!("a matrix product and its gradient are exact ({elapsed_ms:.0} ms)"),
            )
        }
        Err(problem) => Check::fail(
            &about,
            problem,
            "reinstall LibTorch: remove .venv and run `scripts/setup_env.sh`",
        ),
    }
}

const ROWS: usize = 31;
const INNER: usize = 65;
const COLUMNS: usize = 17;

/// Compares with sums of small integers, which every kind of float and every order of summing gets exactly right.
fn compute(device: Device) -> std::result::Result<(), String> {
    let a: Vec<i64> = (0..ROWS * INNER).map(|i| (i * 5 % 7) as i64 - 3).collect();
    let b: Vec<i64> = (0..INNER * COLUMNS).map(|i| (i * 3 % 5) as i64 - 2).collect();
    let product = multiply(&a, &b, [ROWS, INNER, COLUMNS]);
    // Of the sum over half the squares of `a b` by `a`: `(a b) bᵀ`.
    let b_transposed: Vec<i64> =
        (0..COLUMNS * INNER).map(|i| b[i % INNER * COLUMNS + i / INNER]).collect();
    let gradient = multiply(&product, &b_transposed, [ROWS, COLUMNS, INNER]);

    let failed = |error: tch::TchError| attn_torch::brief(&error);
    let matrix = |values: &[i64], rows: usize, columns: usize| {
        let shape = [rows, columns].map(|n| n as i64);
        Tensor::f_from_slice(values)?.f_view(shape)?.f_to_kind(Kind::Float)?.f_to_device(device)
    };
    let (a, b) =
        (matrix(&a, ROWS, INNER).map_err(failed)?, matrix(&b, INNER, COLUMNS).map_err(failed)?);
    let a = a.f_set_requires_grad(true).map_err(failed)?;
    let out = a.f_matmul(&b).map_err(failed)?;
    let loss = out
        .f_square()
        .and_then(|x| x.f_sum(Kind::Float))
        .and_then(|x| x.f_div_scalar(2.))
        .map_err(failed)?;
    loss.f_backward().map_err(failed)?;

    for (what, actual, expected) in
        [("matrix product", &out, product), ("gradient", &a.grad(), gradient)]
    {
        let actual = actual
            .f_to_device(Device::Cpu)
            .and_then(|x| x.f_to_kind(Kind::Int64))
            .map_err(failed)?;
        let actual =
            Vec::<i64>::try_from(actual.f_reshape([-1]).map_err(failed)?).map_err(failed)?;
        if let Some(i) = (0..expected.len()).find(|&i| actual.get(i) != Some(&expected[i])) {
            let shown = actual.get(i).map_or("missing".to_owned(), i64::to_string);
            return Err(format!("element {i} of a {what} is {shown}, {} is right", expected[i]));
        }
    }
    Ok(())
}

fn multiply(a: &[i64], b: &[i64], [rows, inner, columns]: [usize; 3]) -> Vec<i64> {
    let element = |i: usize| -> i64 {
        let (row, column) = (i / columns, i % columns);
        (0..inner).map(|k| a[row * inner + k] * b[k * columns + column]).sum()
    };
    (0..rows * columns).map(element).collect()
}

fn hub(config: &HubConfig) -> Vec<Check> {
    let variables = ["HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"];
    let set: Vec<&str> = variables.into_iter().filter(|name| env::var_os(name).is_some()).collect();
    let set = if set.is_empty() {
        "no HF variable is set".to_owned()
    } else {
        format!("{} set", set.join(", "))
    };
    // Never the token itself.
    let token = if config.token.is_some() { "with a token" } else { "without a token" };
    let found = format!("{} {token} ({set})", config.endpoint);
    let access = match config.offline {
        false => Check::ok("hub", found),
        true if config.cache.is_dir() => Check::ok("hub", "offline: the cache alone answers"),
        true => {
            let found = format!("offline, and there is no cache at {}", config.cache.display());
            Check::warn("hub", found, "unset HF_HUB_OFFLINE, or point HF_HUB_CACHE at a cache")
        }
    };
    let fix = "set HF_HOME or HF_HUB_CACHE to a folder that you may write";
    // Offline a cache is only read: one that is shared and write-protected is as it should be.
    let cache = match config.offline && config.cache.is_dir() {
        true => Check::ok("hub cache", format!("{}, to read", config.cache.display())),
        false => folder("hub cache", &config.cache, fix),
    };
    vec![access, cache]
}

/// Whether a folder, or the nearest one above that exists, can be written, and how much fits.
fn folder(about: &str, path: &Path, fix: &str) -> Check {
    let shown = path.display();
    let Some(existing) = path.ancestors().find(|folder| folder.exists()) else {
        return Check::fail(about, format!("{shown} has no root that exists"), fix);
    };
    let state = if existing == path { "" } else { ", made when first used" };
    if !existing.is_dir() {
        return Check::fail(about, format!("{} is no folder", existing.display()), fix);
    }
    // Trying tells more than permissions do: read-only mounts, quotas, other users' rules.
    if let Err(error) = tempfile::NamedTempFile::new_in(existing) {
        return Check::fail(about, format!("{shown} cannot be written: {}", error.kind()), fix);
    }
    match free_bytes(existing) {
        Some(free) if free < GIB => {
            Check::warn(about, format!("{shown}: {} MiB free", free >> 20), "free some space")
        }
        Some(free) => Check::ok(about, format!("{shown}: {} GiB free{state}", free / GIB)),
        None => Check::ok(about, format!("{shown}{state}")),
    }
}

fn free_bytes(path: &Path) -> Option<u64> {
    let stats = rustix::fs::statvfs(path).ok()?;
    stats.f_bavail.checked_mul(stats.f_frsize)
}

fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_names_its_verdict_and_the_fix_stands_in_the_same_line() {
        assert_eq!(Check::ok("CUDA", "none").to_string(), "ok    CUDA       none");
        assert_eq!(
            Check::fail("cpu", "wrong\n  in detail", "again").to_string(),
            "FAIL  cpu        wrong; in detail; fix: again"
        );
    }

    #[test]
    fn another_libtorch_than_the_wanted_fails() {
        let check =
            |loaded: &str, built| libtorch(Ok(loaded.to_owned()), built, "2.11.0", Path::new("/x"));

        assert_eq!(check("2.11.0", "2.11.0").verdict, Verdict::Ok);
        for check in [check("2.10.0", "2.11.0"), check("2.11.0", "2.10.0")] {
            assert_eq!(check.verdict, Verdict::Fail);
            assert!(check.to_string().contains("fix: run `scripts/setup_env.sh`"), "{check}");
        }
        assert_eq!(
            libtorch(Err("lost".to_owned()), "2.11.0", "2.11.0", Path::new("/x")).verdict,
            Verdict::Fail
        );
    }

    #[test]
    fn more_threads_than_cores_are_warned_of() {
        assert_eq!(threads(2, 2, 2).verdict, Verdict::Ok);
        assert_eq!(threads(2, 16, 2).verdict, Verdict::Warn);
    }

    #[test]
    fn bf16_is_advised_only_with_matrix_units_for_it() {
        let info = |flags| {
            features(&format!("processor\t: 0\nmodel name\t: Chip\nflags\t\t: fpu {flags} xsave\n"))
                .found
        };

        assert_eq!(
            info("avx512_bf16 avx2"),
            "Chip: avx512_bf16 avx2 (without amx_bf16: train in f32)"
        );
        assert_eq!(info("amx_bf16"), "Chip: amx_bf16 (train.precision = \"bf16\" is fast here)");
    }

    #[test]
    fn the_cpu_computes_exactly() {
        compute(Device::Cpu).unwrap();
    }

    #[test]
    fn the_expected_product_is_that_of_the_definition() {
        assert_eq!(multiply(&[1, 2, 3, 4], &[5, 6, 7, 8], [2, 2, 2]), [19, 22, 43, 50]);
    }

    #[test]
    fn folders_that_cannot_be_written_fail_and_missing_ones_are_made_later() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        fs::write(&file, "x").unwrap();

        let there = folder("cache", temp.path(), "fix");
        let later = folder("cache", &temp.path().join("a/b"), "fix");
        let blocked = folder("cache", &file.join("a"), "fix");

        assert_eq!(there.verdict, Verdict::Ok);
        assert!(there.found.ends_with("GiB free"), "{there}");
        assert_eq!(later.verdict, Verdict::Ok);
        assert!(later.found.ends_with("made when first used"), "{later}");
        assert!(!temp.path().join("a").exists(), "a doctor leaves no folders behind");
        assert_eq!(blocked.verdict, Verdict::Fail);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1, "nor files");
    }

    #[test]
    fn the_token_is_never_printed() {
        let config = HubConfig { token: Some("hf_secret".to_owned()), ..HubConfig::default() };

        let text: String = hub(&config).iter().map(Check::to_string).collect();

        assert!(text.contains("with a token") && !text.contains("hf_secret"), "{text}");
    }

    #[test]
    fn offline_without_a_cache_is_warned_of() {
        let config =
            HubConfig { offline: true, cache: "/nowhere/at/all".into(), ..HubConfig::default() };

        assert_eq!(hub(&config)[0].verdict, Verdict::Warn);
    }

    #[test]
    fn a_report_is_healthy_where_nothing_fails() {
        let mut out = Vec::new();

        let healthy = run(&mut out).unwrap();

        let text = String::from_utf8(out).unwrap();
        assert_eq!(healthy, !text.lines().any(|line| line.starts_with("FAIL")), "{text}");
        for about in ["attn", "LibTorch", "threads", "CUDA", "cpu", "hub", "hub cache", "folder"] {
            let found = text.lines().any(|line| line[6..].starts_with(about));
            assert!(found, "no `{about}` in\n{text}");
        }
        let fixes = |line: &str| line.starts_with("ok ") || line.contains("; fix: ");
        assert!(text.lines().all(fixes), "{text}");
    }
}
