//! Values to text: aligned columns, JSON or YAML.

use std::io::{self, Write as _};

use serde::Serialize;

use crate::cli::Output;

/// Something that can be printed in each of the three formats.
pub trait Report: Serialize {
    /// As a person wants it.
    fn table(&self) -> String;
}

/// The text of a report, with its final newline.
pub fn render(report: &impl Report, output: Output) -> String {
    let mut text = match output {
        Output::Table => report.table(),
        Output::Json => serde_json::to_string_pretty(report).expect("keys of reports are strings"),
        Output::Yaml => serde_yaml_ng::to_string(report).expect("keys of reports are strings"),
    };
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

/// Writes to standard output. A reader that has gone (`| head`) is no error.
///
/// # Errors
/// Any other trouble of writing.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Rows below their headings, in columns as wide as they must be.
pub fn columns<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = headings.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let headings = headings.map(str::to_owned);
    for row in std::iter::once(&headings).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            line.push_str(cell);
            let padding = width.saturating_sub(cell.chars().count()) + 2;
            line.extend(std::iter::repeat_n(' ', padding));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [
            ["a".to_owned(), "1".to_owned()],
            ["longer".to_owned(), String::new()],
        ];
        assert_eq!(
            columns(["NAME", "N"], &rows),
            "NAME    N\na       1\nlonger\n"
        );
    }
}
