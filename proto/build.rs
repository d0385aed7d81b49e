//! Compiles the `.proto` files without protoc.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut files: Vec<_> = std::fs::read_dir("proto")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "proto"))
        .collect();
    files.sort();
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, [Path::new("proto")])?;
    let mut config = tonic_prost_build::configure();
    // What is passed on without being looked into is not copied either.
    for field in ["Batch.commands", "Entry.normal", "ProposeRequest.command"] {
        config = config.bytes(format!(".selvedge.peer.v1.{field}"));
    }
    config.compile_fds(descriptors)?;
    Ok(())
}
