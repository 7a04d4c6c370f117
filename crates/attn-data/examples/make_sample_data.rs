//! Writes the bundled sample task: `cargo run -p attn-data --example make_sample_data [FOLDER]`.
//!
//! FOLDER is `data/` of this repository unless another is given. See `data/README.md` for what the files hold.

mod sample_grammar;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use sample_grammar::Row;
use sample_grammar::shortcuts::Score;

#[expect(clippy::print_stdout, reason = "the list of files written is this program's output")]
fn main() -> Result<(), Box<dyn Error>> {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data");
    let folder = std::env::args_os().nth(1).map_or_else(default, PathBuf::from);
    fs::create_dir_all(&folder)?;

    let sample = sample_grammar::generate(sample_grammar::SEED);
    let files = [
        ("sample_data.csv", sample_grammar::csv(&sample.rows).into_bytes()),
        ("sample_data.parquet", parquet(&sample.rows)?),
        ("sample_text.txt", sample_grammar::text(&sample.lines).into_bytes()),
    ];
    for (name, bytes) in files {
        let path = folder.join(name);
        fs::write(&path, &bytes)
            .map_err(|error| format!("cannot write `{}`: {error}", path.display()))?;
        println!("{name}: {} bytes", bytes.len());
    }

    let (n_common, n_held_out) = sample_grammar::n_patterns();
    let unseen = |split| {
        let rows = sample.rows.iter().filter(|row| row.split == split);
        let n_unseen =
            rows.clone().filter(|row| sample_grammar::is_held_out(&row.template)).count();
        100. * n_unseen as f64 / rows.count() as f64
    };
    println!("\n{n_common} patterns in train, {n_held_out} held out of it");
    println!(
        "from held-out patterns: {:.1} % of validation, {:.1} % of test",
        unseen("validation"),
        unseen("test")
    );
    println!("\n| shortcut | train | validation | test |\n| --- | --- | --- | --- |");
    for Score { name, train, validation, test } in sample_grammar::shortcuts::scores(&sample.rows) {
        println!(
            "| {name} | {:.1} % | {:.1} % | {:.1} % |",
            train * 100.,
            validation * 100.,
            test * 100.
        );
    }
    Ok(())
}

fn parquet(rows: &[Row]) -> Result<Vec<u8>, Box<dyn Error>> {
    let strings = |column: fn(&Row) -> &str| {
        Arc::new(StringArray::from_iter_values(rows.iter().map(column))) as ArrayRef
    };
    let labels =
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.label))) as ArrayRef;
    let batch = RecordBatch::try_from_iter([
        ("text", strings(|row| &row.text)),
        ("label", labels),
        ("split", strings(|row| row.split)),
        ("kind", strings(|row| row.kind)),
        ("template", strings(|row| &row.template)),
    ])?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(9)?))
        .set_created_by("attn-data make_sample_data".to_owned())
        .set_max_row_group_row_count(Some(1000))
        .build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties))?;
    writer.write(&batch)?;
    Ok(writer.into_inner()?)
}
