//! What a bench leaves behind: rows, targets, `target/bench/NAME.json`, and a few lines for the reader.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};

/// A number that has to be reached.
#[derive(Clone, Debug, Serialize)]
pub struct Target {
    /// What was measured, with its unit.
    pub what: String,
    /// The measured value.
    pub value: f64,
    /// The limit.
    pub limit: f64,
    /// Whether the value keeps the limit.
    pub met: bool,
}

impl Target {
    /// `value` has to be `limit` or more.
    pub fn at_least(what: impl Into<String>, value: f64, limit: f64) -> Self {
        Self {
            what: what.into(),
            value,
            limit,
            met: value >= limit,
        }
    }

    /// `value` has to be `limit` or less.
    pub fn at_most(what: impl Into<String>, value: f64, limit: f64) -> Self {
        Self {
            what: what.into(),
            value,
            limit,
            met: value <= limit,
        }
    }
}

/// Everything that a bench found.
#[derive(Clone, Debug)]
pub struct Report {
    bench: &'static str,
    rows: Vec<Value>,
    targets: Vec<Target>,
}

impl Report {
    /// An empty report of the bench `bench`.
    pub fn new(bench: &'static str) -> Self {
        Self {
            bench,
            rows: Vec::new(),
            targets: Vec::new(),
        }
    }

    /// Adds a row and prints it.
    pub fn row(&mut self, row: Value) {
        println!("{row}");
        self.rows.push(row);
    }

    /// Adds a target and prints it.
    pub fn target(&mut self, target: Target) {
        let verdict = if target.met { "met   " } else { "MISSED" };
        println!(
            "{verdict} {}: {:.4} (limit {})",
            target.what, target.value, target.limit
        );
        self.targets.push(target);
    }

    /// Writes `target/bench/NAME.json` and says whether every target was met.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(self) -> Result<bool> {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder:?}"))?;
        let path = folder.join(format!("{}.json", self.bench));
        let kernel = nix::sys::utsname::uname().context("cannot read the kernel's release")?;
        let report = json!({
            "bench": self.bench,
            "machine": {
                "cores": std::thread::available_parallelism().map_or(1, usize::from),
                "kernel": kernel.release().to_string_lossy(),
            },
            "rows": self.rows,
            "targets": self.targets,
        });
        fs::write(&path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("cannot write {path:?}"))?;
        println!("written: target/bench/{}.json", self.bench);
        Ok(self.targets.iter().all(|target| target.met))
    }
}

/// The median of paired ratios and the interval that holds it with at least 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Median.
    pub median: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Median and sign-test interval of `ratios`: no assumption about their distribution.
pub fn ratio(mut ratios: Vec<f64>) -> Ratio {
    assert!(!ratios.is_empty(), "a ratio needs at least one pair");
    ratios.sort_by(f64::total_cmp);
    let cut = sign_test_rank(ratios.len());
    Ratio {
        median: percentile(&ratios, 50.0),
        low: ratios[cut],
        high: ratios[ratios.len() - 1 - cut],
    }
}

/// How many of `n` sorted values may be left out at each end so that the rest still holds the median with 95 %.
fn sign_test_rank(n: usize) -> usize {
    let mut probability = 0.5_f64.powi(n as i32);
    let mut tail = probability;
    let mut rank = 0;
    while tail <= 0.025 && rank < n / 2 {
        rank += 1;
        probability *= (n - rank + 1) as f64 / rank as f64;
        tail += probability;
    }
    rank.saturating_sub(1)
}

/// The `percent`-th percentile of sorted values, by linear interpolation.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let at = percent / 100.0 * (sorted.len() - 1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_fifteen_pairs_leaves_out_three_at_each_end() {
        let ratios = (1..=15).map(f64::from).collect();
        assert_eq!(
            ratio(ratios),
            Ratio {
                median: 8.0,
                low: 4.0,
                high: 12.0
            }
        );
    }

    #[test]
    fn few_pairs_have_their_whole_range_as_interval() {
        assert_eq!(
            ratio(vec![3.0, 1.0, 2.0]),
            Ratio {
                median: 2.0,
                low: 1.0,
                high: 3.0
            }
        );
    }

    #[test]
    fn percentiles_interpolate() {
        let values = [0.0, 10.0, 20.0];
        assert_eq!(percentile(&values, 50.0), 10.0);
        assert_eq!(percentile(&values, 75.0), 15.0);
    }

    #[test]
    fn a_missed_target_is_told() {
        assert!(!Target::at_least("x", 0.9, 1.0).met);
        assert!(Target::at_most("x", 0.9, 1.0).met);
    }
}
