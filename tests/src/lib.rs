//! Building blocks of the tests.
pub mod bench;
