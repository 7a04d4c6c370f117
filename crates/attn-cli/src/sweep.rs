//! `attn sweep`: the runs of a grid, one after another, and what they say together.
//!
//! Each run is a process of its own, `attn finetune` or `attn distill` with the settings of its place in the grid. LibTorch's random
//! streams, thread count and allocator belong to a process: so a run of a sweep is, bit for bit, the run that the same
//! command makes alone, and one that aborts or runs out of memory takes no other along. The price is loading LibTorch
//! and the data anew, a second or so a run.

mod distances;
mod plan;
mod report;

use std::{
    fs::{self, File, TryLockError},
    io::Write,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::Path,
    process::{Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    Outcome,
    args::SweepArgs,
    monitor::{self, INTERRUPTED},
    run_dir::{self, RunDir},
    start::{invocation, name_of, quoted},
};
pub(crate) use plan::understand;
pub(crate) use report::{Answers, Line, line as csv_line};

use plan::{Plan, Planned, Status};

/// What marks a folder as that of a sweep: its FILE, as it was when last started.
const SWEEP_FILE: &str = "sweep.toml";

/// The complete config of the run that is started.
const NEXT_FILE: &str = ".next.toml";

/// Held by the sweep and its runs.
const LOCK_FILE: &str = ".sweep.lock";

/// How long to wait for a process that is about to end.
const PATIENCE: Duration = Duration::from_secs(3);

/// Time between looks at a run that goes on.
const POLL: Duration = Duration::from_millis(20);

/// A run that did not finish.
struct Failure {
    folder: String,
    how: String,
}

/// `flags` say how much the runs tell.
pub(crate) fn run(args: &SweepArgs, flags: &[&str], out: &mut dyn Write) -> Result<Outcome> {
    let dir = args.out.clone().unwrap_or_else(|| Path::new("runs").join(name_of(&args.file)));
    let plan = Plan::read(args)?;
    check_folder(&dir)?;
    plan.check_models()?;
    if args.dry_run {
        list(&plan, &dir, &plan.statuses(&dir)?, out)?;
        return Ok(Outcome::Done);
    }
    fs::create_dir_all(&dir).with_context(|| format!("cannot create `{}`", dir.display()))?;
    let lock = lock(&dir)?;
    let statuses = plan.statuses(&dir)?;
    let text = fs::read_to_string(&args.file)
        .with_context(|| format!("cannot read `{}`", args.file.display()))?;
    let header = format!("# A copy, made by:\n#   {}\n\n", command(args, &dir));
    run_dir::write(&dir.join(SWEEP_FILE), (header + &text).as_bytes())?;
    let stop = Arc::<AtomicBool>::default();
    monitor::stop_on_signals(&stop)?;

    let mut failures = Vec::new();
    let mut left = statuses.iter().filter(|status| !status.is_finished()).count();
    for (planned, status) in plan.runs.iter().zip(&statuses) {
        let run_dir = dir.join(&planned.folder);
        if status.is_finished() {
            RunDir::reopen(&run_dir)?.remove_checkpoints();
            continue;
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(interrupted(args, &dir, left, plan.runs.len()));
        }
        let n_done = plan.runs.len() - left;
        tracing::info!("run {} of {}: {}", n_done + 1, plan.runs.len(), planned.folder);
        let ended = one(args, flags, planned, &run_dir, status, &lock, &stop)?;
        match ended.code() {
            Some(0) => {}
            code if stop.load(Ordering::Relaxed) || code == Some(INTERRUPTED.into()) => {
                return Ok(interrupted(args, &dir, left, plan.runs.len()));
            }
            _ => {
                let how = match (ended.code(), ended.signal()) {
                    (Some(code), _) => format!("exit code {code}"),
                    (None, signal) => format!("signal {}", signal.unwrap_or_default()),
                };
                tracing::warn!("the run `{}` failed ({how}); the others go on", planned.folder);
                failures.push(Failure { folder: planned.folder.clone(), how });
            }
        }
        left -= 1;
    }
    if plan.distills {
        distances::tell(&plan, &dir, &args.file, &failures, out)?;
    } else {
        let report = report::Report::new(&plan, &dir, &args.file, &failures)?;
        report.write(&dir)?;
        report.print(out)?;
    }
    for Failure { folder, how } in &failures {
        tracing::warn!("the run `{folder}` failed ({how}); its message stands above");
    }
    if failures.is_empty() {
        return Ok(Outcome::Done);
    }
    tracing::warn!("what failed is tried again by\n  {}", command(args, &dir));
    Ok(Outcome::Failed)
}

/// Runs one to its end, or until the user stops it.
fn one(
    args: &SweepArgs,
    flags: &[&str],
    planned: &Planned,
    dir: &Path,
    status: &Status,
    lock: &File,
    stop: &AtomicBool,
) -> Result<ExitStatus> {
    if matches!(status, Status::New) {
        run_dir::clear_start(dir)?;
    }
    // Not by its path: the file there may be a newer one by now.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("attn").args(flags).arg(planned.command());
    match status {
        Status::Begun { .. } => drop(command.arg("--resume")),
        // As it was planned, whatever becomes of the base meanwhile.
        _ => {
            let path = dir.with_file_name(NEXT_FILE);
            run_dir::write(&path, planned.toml()?.as_bytes())?;
            command.arg(path);
        }
    }
    command.arg("--out").arg(dir).args(["--device", &args.device]);
    command.arg("--parent").arg(std::process::id().to_string());
    // The run holds the sweep's lock too, so that nobody enters the folder before it is gone.
    command.stdin(lock.try_clone().context("cannot share the sweep's lock")?);
    command.stdout(Stdio::null());
    // Ctrl-C in a terminal goes to a whole group, and a run takes the second one for impatience: it hears from us alone.
    command.process_group(0);
    let mut child = command.spawn().context("cannot start a run")?;
    let mut was_told = false;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a run")? {
            return Ok(status);
        }
        if stop.load(Ordering::Relaxed) && !was_told {
            was_told = true;
            // It may have ended just now.
            let _ = kill_process(Pid::from_child(&child), Signal::INT);
        }
        thread::sleep(POLL);
    }
}

/// Refuses a folder that holds something else.
fn check_folder(dir: &Path) -> Result<()> {
    let shown = dir.display();
    match fs::read_dir(dir) {
        Ok(mut entries) => {
            let is_ours = dir.join(SWEEP_FILE).is_file() || dir.join(LOCK_FILE).is_file();
            ensure!(
                is_ours || entries.next().is_none(),
                "`{shown}` holds something that is no sweep: there is no `{SWEEP_FILE}`\nhint: name a new folder: \
                 --out DIR"
            );
        }
        Err(_) if dir.exists() => bail!("`{shown}` is not a folder\nhint: name a new one"),
        Err(_) => {}
    }
    Ok(())
}

/// Takes the folder for this process and those it starts, until all are gone.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK_FILE);
    let shown = path.display();
    let mut options = File::options();
    let file = options.create(true).truncate(false).read(true).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open `{shown}`"))?;
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock `{shown}`"));
            }
        }
        ensure!(
            started.elapsed() < PATIENCE,
            "another sweep is at work in `{}`\nhint: wait for it, or name another folder: --out DIR",
            dir.display()
        );
        thread::sleep(POLL);
    }
}

/// The command that goes on.
fn command(args: &SweepArgs, dir: &Path) -> String {
    let mut text = format!("sweep {} --out {}", shell(&args.file), shell(dir));
    for pair in &args.set {
        text += &format!(" --set {}", quoted(pair));
    }
    if args.device != "auto" {
        text += &format!(" --device {}", quoted(&args.device));
    }
    invocation(&text)
}

fn shell(path: &Path) -> String {
    quoted(&path.display().to_string())
}

fn interrupted(args: &SweepArgs, dir: &Path, left: usize, n_runs: usize) -> Outcome {
    tracing::warn!(
        "stopped with {left} of {n_runs} runs left; the sweep goes on by\n  {}",
        command(args, dir)
    );
    Outcome::Interrupted
}

/// `--dry-run`.
fn list(plan: &Plan, dir: &Path, statuses: &[Status], out: &mut dyn Write) -> Result<()> {
    let n_finished = statuses.iter().filter(|status| status.is_finished()).count();
    writeln!(out, "{}: {} runs, {n_finished} finished", dir.display(), statuses.len())?;
    writeln!(out)?;
    let width = plan.runs.iter().map(|run| run.folder.chars().count()).max().unwrap_or(0);
    for (run, status) in plan.runs.iter().zip(statuses) {
        let state = match status {
            Status::Finished { elapsed_s, .. } => format!("finished, {}", duration(*elapsed_s)),
            Status::Begun { step: 0 } => "begun".into(),
            Status::Begun { step } => format!("begun, step {step} saved"),
            Status::New => "new".into(),
        };
        writeln!(out, "  {:<width$}  {state}", run.folder)?;
    }
    writeln!(out)?;
    match plan::seconds_left(plan, statuses) {
        _ if n_finished == statuses.len() => writeln!(out, "nothing is left to run")?,
        Some(seconds) => writeln!(
            out,
            "about {} for the {} left, by the mean of those finished (of the same setting where there are any)",
            duration(seconds),
            statuses.len() - n_finished
        )?,
        None => writeln!(out, "time unknown: no run has finished yet")?,
    }
    Ok(())
}

/// Seconds as a person says them.
fn duration(seconds: f64) -> String {
    match seconds.round() as u64 {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        seconds => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}
