//! What a layer syncs: a part of the desired state.

use super::Scope;
use crate::{
    compile::{Compiler, Problem},
    model::{Dirty, Model},
    state::DesiredState,
};

/// What compiling a scope gives.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// What was compiled: at least what was asked for, and the Services that this touches.
    pub scope: Scope,
    /// The desired state of that scope.
    pub state: DesiredState,
}

impl Compiled {
    /// Compiles `scope` of `model`; also gives the problems that were not there before.
    pub fn of(compiler: &mut Compiler, model: &Model, scope: &Scope) -> (Self, Vec<Problem>) {
        let compiled = match scope {
            Scope::All => compiler.compile_all(model),
            Scope::Part(dirty) => compiler.compile(model, dirty),
        };
        let scope = match scope {
            Scope::All => Scope::All,
            Scope::Part(_) => Scope::Part(Dirty {
                services: compiled.services_in_scope,
                addresses: compiled.addresses_in_scope,
                networks: false,
            }),
        };
        let state = compiled.state;
        (Self { scope, state }, compiled.problems)
    }
}
