//! Runs a tool: text in, text out.

use std::{
    env, fs,
    io::{self, Seek as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::backends::Error;

/// Searched after PATH, which of a service often lacks them.
const SYSTEM_DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// What a tool said.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// It ended with exit code 0.
    pub success: bool,
    /// Its exit code; none after a signal.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its error output.
    pub stderr: String,
}

/// Where the program called `name` is.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let is_program = |file: &PathBuf| {
        fs::metadata(file)
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    env::split_paths(&path)
        .chain(SYSTEM_DIRECTORIES.map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(is_program)
}

/// Runs `tool` with `input` as its standard input. The input is a file in memory, so that neither waits for the other.
///
/// # Errors
/// It could not be started.
pub fn run(tool: &Path, args: &[&str], input: &str) -> Result<Output, Error> {
    let failed = |cause: io::Error| Error::Kernel {
        action: "run",
        object: tool.display().to_string(),
        cause,
        hint: "",
    };
    let stdin = match input {
        "" => Stdio::null(),
        text => Stdio::from(in_memory(text).map_err(failed)?),
    };
    let output = Command::new(tool)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(stdin)
        .output()
        .map_err(failed)?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Output {
        success: output.status.success(),
        code: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    })
}

fn in_memory(text: &str) -> io::Result<fs::File> {
    let mut file = fs::File::from(memfd_create(c"proxy-agent-rules", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file)
}

/// The error of a tool that did not do what it was asked for.
pub fn failed(tool: &Path, output: &Output) -> Error {
    let said = output.stderr.trim();
    let code = output
        .code
        .map_or_else(|| "a signal".to_owned(), |code| format!("exit code {code}"));
    Error::Unusable(format!("{} ended with {code}: {said}", tool.display()))
}
