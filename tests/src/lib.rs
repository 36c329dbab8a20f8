//! Building blocks of the tests.
