//! Objects that something is wrong with.

use super::*;

impl Object {
    /// Makes the verifier refuse a program: it uses a register that nobody set.
    pub fn spoil(&mut self, hook: Hook) {
        let key = self.parsed.programs[hook.name()].function_key();
        let function = self.parsed.functions.get_mut(&key).unwrap();
        let add_one_to_r9 = sys::insn(0x07, 9, 1);
        function.instructions[0] = add_one_to_r9;
        self.digest += 2;
    }
}

#[test]
fn the_verifiers_last_lines_are_shown() {
    let log: Vec<String> = (1..=30).map(|line| line.to_string()).collect();
    let shown = tail(&log.join("\n"));
    assert!(
        shown.starts_with("11\n12\n") && shown.ends_with("\n30"),
        "{shown}"
    );
    assert_eq!(tail("one"), "one");
}

#[test]
fn garbage_is_no_object() {
    let constants = Constants {
        can_refuse: true,
        log: false,
    };
    let error = Object::parse(b"not an object", constants).err().unwrap();
    assert!(error.to_string().contains("object"), "{error}");
}
