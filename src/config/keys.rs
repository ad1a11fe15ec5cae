//! The one table of keys. The file, the environment, the suggestions for misspelt names and the tests of the
//! documentation all read it, so that they cannot diverge.

/// One key of the configuration.
#[derive(Debug)]
pub struct Key {
    /// The table of the file that it stands in.
    pub section: &'static str,
    /// Its name there.
    pub name: &'static str,
    /// How it is written.
    pub kind: Kind,
    /// What it is when nobody says, as the file would write it; `None`: it must be given.
    pub default: Option<&'static str>,
    /// What it does, in one line.
    pub doc: &'static str,
}

/// How the value of a key is written in the file, and in its environment variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A string in both.
    Text,
    /// A string that may hold a password, and is therefore never repeated.
    Secret,
    /// A whole number in both.
    Number,
    /// `true` or `false` in both.
    Switch,
    /// An array of strings; separated by commas in the environment.
    List,
    /// A program and its arguments: an array of strings; in the environment a JSON array, or words separated by
    /// spaces (no quotes, no shell).
    Command,
}

impl Key {
    /// `section.name`, as messages spell it.
    #[must_use]
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// `PGTANDEM_<SECTION>_<KEY>`
    #[must_use]
    pub fn environment(&self) -> String {
        format!("{PREFIX}{}_{}", self.section.to_uppercase(), self.name.to_uppercase())
    }
}

/// What the names of our environment variables begin with.
pub const PREFIX: &str = "PGTANDEM_";

/// Variables that begin like ours and are not keys: the cache of provisioned servers, and what a cutover hook or a
/// test is told. A name that ends with `_` stands for all that begin so.
pub const OTHER_VARIABLES: &[&str] = &["PGTANDEM_CACHE", "PGTANDEM_HOOK_", "PGTANDEM_TEST_"];

macro_rules! key {
    ($section:literal . $name:literal, $kind:ident, $default:expr, $doc:literal) => {
        Key { section: $section, name: $name, kind: Kind::$kind, default: $default, doc: $doc }
    };
}

/// Every key, in the order of the annotated example.
pub const KEYS: &[Key] = &[
    key!("move"."name", Text, Some("\"app\""), "names the move: its slot, publication and state rows; [a-z0-9_]{1,40}"),
    key!("move"."include", List, Some("[]"), "patterns of the tables that move, such as public.*; empty: every table of a user"),
    key!("move"."exclude", List, Some("[]"), "patterns of tables taken away from what is included"),
    key!("move"."large_objects", Switch, Some("true"), "carry large objects at the cutover"),
    key!("source"."url", Secret, None, "connection string of the server that the application uses today"),
    key!("source"."url_from_target", Secret, Some("\"\""), "connection string by which the target server reaches the source, for follow.engine = \"subscription\"; empty: source.url"),
    key!("target"."url", Secret, None, "connection string of the server that it will use"),
    key!("copy"."method", Text, Some("\"copy\""), "how the first copy is made: copy, dump or none"),
    key!("copy"."workers", Number, Some("4"), "tables, or parts of a large one, copied at the same time; 1 to 64"),
    key!("copy"."index_workers", Number, Some("2"), "indexes built at the same time; 1 to 64"),
    key!("copy"."split_above", Text, Some("\"1GiB\""), "a larger table is copied in parts, by several workers, and a death loses only the parts in flight; at least 1MiB"),
    key!("copy"."first", List, Some("[]"), "patterns of tables that are copied before all others, in this order"),
    key!("copy"."max_bytes_per_second", Text, Some("\"0\""), "the copy reads no more than this from the source, in a second and all together; 64KiB and more, or 0: as fast as it goes"),
    key!("copy"."keep_archive", Switch, Some("false"), "keep the archive of copy.method = \"dump\" once its rows are on the target"),
    key!("follow"."engine", Text, Some("\"stream\""), "who applies the changes: stream (pgtandem) or subscription (the target server)"),
    key!("follow"."workers", Number, Some("1"), "target connections that apply; 1 to 16"),
    key!("follow"."batch_max_delay", Text, Some("\"200ms\""), "a batch is committed at the latest after this; 1ms to 1m"),
    key!("follow"."batch_max_bytes", Text, Some("\"32MiB\""), "a batch is committed once it holds this much; 64KiB to 1GiB"),
    key!("follow"."spill_max_bytes", Text, Some("\"8GiB\""), "disk for transactions that the source sends while they are in progress; 0 to 16TiB, 0: it keeps them itself"),
    key!("follow"."spool", Text, Some("\"\""), "folder for the changes that come while rows are copied, so that the source need not keep their WAL; empty: the source keeps it"),
    key!("follow"."spool_max_bytes", Text, Some("\"50GiB\""), "disk for them; 1MiB to 16TiB; beyond, the source keeps its WAL again"),
    key!("follow"."ddl", Text, Some("\"replicate\""), "what a schema change on the source does: replicate or stop"),
    key!("follow"."missing_row", Text, Some("\"stop\""), "what a changed row that the target lacks does: stop or record"),
    key!("follow"."without_identity", Text, Some("\"watch\""), "tables without a replica identity: watch, full or copy"),
    key!("cutover"."max_lag", Text, Some("\"1s\""), "ready below this lag; 10ms to 1h"),
    key!("cutover"."timeout", Text, Some("\"30s\""), "the fence lifts by itself after this; 1s to 1h"),
    key!("cutover"."fence", Text, Some("\"lock\""), "what stops writes on the source: lock, read-only or none"),
    key!("cutover"."verify", Text, Some("\"counts\""), "compared after the drain, inside the timeout: off, counts or full"),
    key!("cutover"."refresh", Switch, Some("true"), "refresh the materialized views shortly before the fence closes"),
    key!("cutover"."reverse", Switch, Some("true"), "arm the way back before writes are let in"),
    key!("cutover"."hook", Command, Some("[]"), "program and arguments run for the switch; sees PGTANDEM_* in its environment"),
    key!("cutover"."pgbouncer", Secret, Some("\"\""), "admin connection of PgBouncer: PAUSE before, RELOAD and RESUME after; empty: none"),
    key!("cutover"."pgbouncer_database", Text, Some("\"\""), "the database to pause there; empty: all"),
    key!("http"."listen", Text, Some("\"127.0.0.1:8432\""), "address of the read-only HTTP side; empty turns it off"),
    key!("log"."level", Text, Some("\"info\""), "error, warn, info, debug, trace, or a filter such as info,pgtandem::follow=debug"),
    key!("log"."format", Text, Some("\"text\""), "text for people, json for programs (one object a line)"),
];

/// The key of that section and name.
pub(super) fn find(section: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.section == section && key.name == name)
}

/// Which of `known` was probably meant.
pub(super) fn nearest(text: &str, known: impl Iterator<Item = String>) -> Option<String> {
    known
        .map(|known| (strsim::normalized_damerau_levenshtein(&known, text), known))
        .filter(|(likeness, _)| *likeness >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}
