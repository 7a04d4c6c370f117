//! The `attn` command: arguments, config files, printing. A library for the sake of `fuzz/` alone: [`main`] is the program.
//!
//! Data goes to stdout, everything else to stderr. The exit code is 0, 1 for a failure, 2 for wrong usage, and 130
//! where the user interrupted.

mod ablate;
mod args;
mod attended;
mod attention_shift;
mod attention_table;
mod blimp;
mod choose;
mod compare;
mod compare_scores;
mod complain;
mod config;
mod convert;
mod data;
mod distill;
mod doctor;
mod eval;
mod explain;
mod fault;
mod finetune;
mod flags_file;
mod forward;
mod generate;
mod haystack;
mod head_names;
mod head_roles;
mod heatmap;
mod leaderboard;
mod list;
mod logging;
mod memory;
mod monitor;
mod needle;
mod origin;
mod patch;
mod perplexity;
mod plot;
mod plots;
mod pretrain;
mod prune;
mod prune_curve;
#[doc(hidden)]
pub mod readers;
mod report;
mod run_dir;
mod save;
mod score_heads;
mod score_retrieval;
mod scoring;
mod settings;
mod sources;
mod start;
mod subject;
mod surgery;
mod swap;
mod sweep;
mod task;
mod texts;
mod tokenize;
mod verify;

use std::{
    io::{self, Write},
    process::ExitCode,
    sync::Arc,
};

use args::{Args, Command, ScoreHeads};
use clap::{CommandFactory, Parser};

/// What a command ends with, short of an error.
enum Outcome {
    Done,
    /// Something is off, and has been said.
    Failed,
    /// The user stopped it; it can go on later.
    Interrupted,
}

/// What the program `attn` does, with what was typed.
pub fn main() -> ExitCode {
    attn_torch::tune_allocator();
    // A limit on the size of files is an error of the write that meets it, and not the end of the process.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
    let typed: Vec<_> = std::env::args_os().collect();
    let is_command = |word: &str| Args::command().find_subcommand(word).is_some();
    let command = typed.iter().filter_map(|it| it.to_str()).find(|it| is_command(it));
    let command = format!("attn {}", command.unwrap_or_default());
    let args = match flags_file::with_flags(typed, Args::command) {
        Ok(words) => Args::parse_from(words),
        Err(error) => {
            complain::print(&error);
            return ExitCode::FAILURE;
        }
    };
    logging::init(args.verbose, args.quiet);
    if args.despite_memory {
        memory::begin_anyway();
    }
    match fault::caught(&command, || run(args)) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Failed) => ExitCode::FAILURE,
        Ok(Outcome::Interrupted) => ExitCode::from(monitor::INTERRUPTED),
        // The reader has seen enough: `attn list | head -1`.
        Err(error) if complain::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            complain::print(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<Outcome> {
    let mut out = io::stdout().lock();
    let mut outcome = Outcome::Done;
    match args.command {
        Command::Finetune(args) => outcome = finetune::run(&args, &mut out)?,
        Command::Pretrain(args) => outcome = pretrain::run(&args, &mut out)?,
        Command::Distill(args) => outcome = distill::run(&args, &mut out)?,
        Command::Sweep(sweep) => {
            let mut flags = logging::flags(args.verbose, args.quiet);
            flags.extend(args.despite_memory.then_some("--despite-memory"));
            outcome = sweep::run(&sweep, &flags, &mut out)?;
        }
        Command::Eval(args) => eval::run(&args, &mut out)?,
        Command::Explain(args) => outcome = explain::run(&args, &mut out)?,
        Command::ScoreHeads(ScoreHeads::Rows(args)) => score_heads::run(&args, &mut out)?,
        Command::ScoreHeads(ScoreHeads::Needles(args)) => score_retrieval::run(&args, &mut out)?,
        Command::Ablate(args) => ablate::run(&args, &mut out)?,
        Command::Compare(args) => compare::run(&args, &mut out)?,
        Command::CompareScores(args) => compare_scores::run(&args, &mut out)?,
        Command::PruneCurve(args) => prune_curve::run(&args, &mut out)?,
        Command::Patch(args) => patch::run(&args, &mut out)?,
        Command::Prune(args) => prune::run(&args, &mut out)?,
        Command::HeadRoles(args) => head_roles::run(&args, &mut out)?,
        Command::AttentionShift(args) => attention_shift::run(&args, &mut out)?,
        Command::Leaderboard(args) => leaderboard::run(&args, &mut out)?,
        Command::Needle(args) => needle::run(&args, &mut out)?,
        Command::Forward(args) => forward::run(&args)?,
        Command::Generate(args) => generate::run(&args, &mut out)?,
        Command::Heatmap(args) => heatmap::run(&args, &mut out)?,
        Command::Report(args) => report::run(&args, &mut out)?,
        Command::Plot(args) => plot::run(&args, &mut out)?,
        Command::Convert(args) => convert::run(&args, &mut out)?,
        Command::Choose(args) => choose::run(&args, &mut out)?,
        Command::Swap(args) => swap::run(&args, &mut out)?,
        Command::Save(args) => save::run(&args, &mut out)?,
        Command::Tokenize(args) => tokenize::run(&args, &mut out)?,
        Command::Verify(args) => outcome = verify::run(&args, &mut out)?,
        Command::Doctor => {
            if !doctor::run(&mut out)? {
                outcome = Outcome::Failed;
            }
        }
        Command::List => list::run(&mut out)?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "attn", &mut script);
            out.write_all(&script)?;
        }
    }
    out.flush()?;
    Ok(outcome)
}
