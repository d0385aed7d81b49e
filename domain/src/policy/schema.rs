//! The Cedar schema that ships with the product.

use std::sync::LazyLock;

use cedar_policy::{Schema, Validator};

/// The schema as people read it.
pub const SCHEMA: &str = include_str!("selvedge.cedarschema");

/// Entities are dereferenced no deeper than this, and slices of a request's entities are built to it.
pub const DEREFERENCES_MAX: u32 = 1;

pub(super) static VALIDATOR: LazyLock<Validator> = LazyLock::new(|| {
    let (schema, _) =
        Schema::from_cedarschema_str(SCHEMA).expect("the schema is part of the program, and a test reads it");
    Validator::new(schema)
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_is_read_without_a_warning() {
        let (_, warnings) = Schema::from_cedarschema_str(SCHEMA).unwrap();
        let warnings: Vec<String> = warnings.map(|w| w.to_string()).collect();
        assert!(warnings.is_empty(), "{warnings:?}");
        assert_eq!(VALIDATOR.schema().actions().count(), 1);
    }
}
