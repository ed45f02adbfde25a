//! Writes the certificates and passwords for compose.secure.yaml into a folder:
//! `credentials <folder>`. For people without Rust it is built as an image.

#![allow(clippy::print_stdout, reason = "the output of a command")]

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: credentials <folder>");
        return ExitCode::FAILURE;
    };
    match credentials::compose::write(&folder) {
        Ok(()) => {
            println!("The certificates and passwords for compose.secure.yaml are in {}.", folder.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
