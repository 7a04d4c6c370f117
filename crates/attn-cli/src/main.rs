//! The `attn` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    attn_cli::main()
}
