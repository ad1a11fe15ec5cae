//! Random schemas: what a table may be made of, and the SQL that makes it.

use proptest::prelude::*;

/// Types of columns, each with texts that its input takes. A value is one of them, or NULL.
const TYPES: [(&str, &[&str]); 28] = [
    ("text", &["", "null", "NULL", r"\N", r"\.", "a\tb\nc\\d", "'", "\"", "ä€𝄞", " x ", "{}", "$1 %s"]),
    ("varchar(9)", &["", "null", "äöüß€𝄞", "   "]),
    ("char(5)", &["", "a", " b", "äö€"]),
    ("bool", &["t", "f"]),
    ("int2", &["-32768", "32767", "0"]),
    ("int8", &["-9223372036854775808", "9223372036854775807", "0"]),
    ("float4", &["NaN", "-Infinity", "-0", "1e-45", "0.1", "3.4028235e38"]),
    ("float8", &["NaN", "Infinity", "-0", "0", "5e-324", "0.1", "1.7976931348623157e308"]),
    ("numeric", &["NaN", "0", "0.00", "1.10", "1.1", "-0.000000000000000000001", "1e100"]),
    ("bytea", &["", r"\x00", r"\x5c5c27", r"\xff00fe"]),
    ("date", &["infinity", "4713-01-01 BC", "2024-02-29", "5874897-12-31"]),
    ("time", &["24:00:00", "00:00:00.000001"]),
    ("timestamp", &["infinity", "0044-03-15 12:00 BC", "1999-03-02 01:02:03.4"]),
    ("timestamptz", &["-infinity", "294276-12-31 23:59:59.999999+00", "1890-01-01 00:00:00+01"]),
    ("interval", &["0", "-1 mon +1 day -23:59:59.999999", "178000000 years"]),
    ("uuid", &["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"]),
    ("varbit", &["", "0", "1010101"]),
    ("json", &["null", "\"\"", "{\"a\" : 1, \"a\":2 }", "[1,  1.0,1e2]"]),
    ("jsonb", &["null", "{\"a\":1,\"a\":2}", "[1.0, 1e2, 1.000]"]),
    ("xml", &["", "text only", "<a/><b/>"]),
    ("point", &["(0,-0)", "(1e-300,1e300)", "(NaN,0.1)"]),
    ("inet", &["0.0.0.0/0", "::1", "1.2.3.4/8"]),
    ("int4range", &["empty", "(,)", "[1,5)"]),
    ("mood", &["sad", "", "it's, \"ok\""]),
    ("pair", &["(,)", "(1,)", "(,\"\")", r#"(-1,"a,b""c\\d(e)")"#]),
    ("int4[]", &["{}", "{NULL}", "[-2:0]={1,NULL,3}", "{{1,2},{NULL,4}}"]),
    ("text[]", &["{}", "{\"\"}", "{\"NULL\",NULL}", r#"{"a\"b\\c","e,f"," "}"#]),
    ("pair[]", &["{}", r#"{"(1,\"a\"\"b\")",NULL,"(,)"}"#]),
];

/// What everything below needs. The collation holds `a` and `A` for the same.
pub const PRELUDE: &str = r#"
    create type mood as enum ('sad', '', 'it''s, "ok"');
    create type pair as (a int, b text);
    create domain small as int check (value between -100 and 100);
    create collation alike (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
    create table witness (id serial primary key, what text);
    create function tell() returns trigger language plpgsql as $$ begin
        insert into public.witness (what) values (TG_ARGV[0] || ' ' || TG_OP); return null; end $$;
    create function touch() returns trigger language plpgsql as $$ begin new.n := coalesce(new.n, 0) + 1; return new; end $$;
    create function never() returns trigger language plpgsql as $$ begin raise 'fired on the target'; end $$;
    create table zz_gate (id int primary key);
    insert into zz_gate values (1);
"#;

/// What a row is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Int,
    Two,
    Text,
    Alike,
    Numeric,
    Float,
    Domain,
    Pair,
    Mood,
    Bytes,
    /// An index that is no primary key.
    Index,
    /// Identifies nothing by itself.
    Deferrable,
    None,
}

impl Key {
    const ALL: [Self; 13] = [
        Self::Int,
        Self::Two,
        Self::Text,
        Self::Alike,
        Self::Numeric,
        Self::Float,
        Self::Domain,
        Self::Pair,
        Self::Mood,
        Self::Bytes,
        Self::Index,
        Self::Deferrable,
        Self::None,
    ];

    const fn type_name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Alike => "text collate alike",
            Self::Numeric => "numeric",
            Self::Float => "float8",
            Self::Domain => "small",
            Self::Pair => "pair",
            Self::Mood => "mood",
            Self::Bytes => "bytea",
            _ => "int",
        }
    }

    /// The key number `n`; some numbers give values that are equal and do not look the same.
    pub fn literal(self, n: u8) -> String {
        let n = i32::from(n % 16);
        match self {
            Self::Text => format!("'k\\ \"''{n},ä'"),
            Self::Alike => format!("'{}{}'", if n % 2 == 0 { 'a' } else { 'A' }, n / 2),
            Self::Numeric => format!("{}.{}", n / 2, "0".repeat(1 + n as usize % 2)),
            Self::Float => {
                ["'-0'", "'0'", "'NaN'", "'Infinity'", "0.1", "5e-324", "1e300", "-1"][n as usize % 8].to_owned()
            }
            Self::Pair => format!("'({n},\"a \"\"{n}\"\",b\")'::pair"),
            Self::Mood => ["'sad'", "''", "'it''s, \"ok\"'"][n as usize % 3].to_owned(),
            Self::Bytes => format!("'\\x00{n:02x}5c'"),
            _ => n.to_string(),
        }
    }

    /// Whether arithmetic goes with it.
    pub fn counts(self) -> bool {
        matches!(self, Self::Int | Self::Two | Self::Index | Self::Deferrable | Self::Domain)
    }
}

/// How the rows of a table are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    Plain,
    /// Another table inherits from it.
    Parent,
    Range,
    Hash,
    /// Partitions of partitions.
    Nested,
}

/// A table to be.
#[derive(Clone, Debug)]
pub struct Table {
    pub key: Key,
    pub full: bool,
    pub spread: Spread,
    /// Types of further columns, as positions in [`TYPES`].
    pub columns: Vec<usize>,
    /// A second unique index: whether it is deferrable.
    pub unique: Option<bool>,
    /// Refers to the table with this number, counted from the first, if that can be; itself at its own number.
    pub reference: Option<(u8, u8)>,
    pub exclusion: bool,
    pub generated: bool,
    pub identity: u8,
    pub trigger: u8,
    pub dropped_column: bool,
    pub odd_name: u8,
}

pub fn table() -> impl Strategy<Value = Table> {
    let spread = prop_oneof![
        5 => Just(Spread::Plain), 1 => Just(Spread::Parent), 1 => Just(Spread::Range), 1 => Just(Spread::Hash), 1 => Just(Spread::Nested)
    ];
    (
        (prop_oneof![2 => Just(Key::Int), 5 => prop::sample::select(&Key::ALL[..])], prop::bool::weighted(0.3), spread),
        prop::collection::vec(0..TYPES.len(), 0..5),
        prop::option::weighted(0.3, any::<bool>()),
        prop::option::weighted(0.3, any::<(u8, u8)>()),
        (prop::bool::weighted(0.15), prop::bool::weighted(0.3), 0..5u8, 0..8u8, prop::bool::weighted(0.2), 0..8u8),
    )
        .prop_map(|((key, full, spread), columns, unique, reference, rest)| {
            let (exclusion, generated, identity, trigger, dropped_column, odd_name) = rest;
            Table {
                key,
                full,
                spread,
                columns,
                unique,
                reference,
                exclusion,
                generated,
                identity,
                trigger,
                dropped_column,
                odd_name,
            }
        })
}

/// A table with its place among the others.
#[derive(Clone, Copy)]
pub struct Placed<'a> {
    pub at: usize,
    pub all: &'a [Table],
}

impl<'a> Placed<'a> {
    pub fn table(self) -> &'a Table {
        &self.all[self.at]
    }

    /// Quoted.
    pub fn name(self) -> String {
        let at = self.at;
        match self.table().odd_name {
            0 => format!(r#""T.{at} ""x"" \ '$$ ä;""#),
            1 => format!("\"{}{at}\"", "ä".repeat(31)),
            2 => format!("\"select{at}\""),
            _ => format!("t{at}"),
        }
    }

    fn partitioned(self) -> bool {
        matches!(self.table().spread, Spread::Range | Spread::Hash | Spread::Nested) && self.key_can_partition()
    }

    fn key_can_partition(self) -> bool {
        matches!(self.table().key, Key::Int | Key::Two | Key::None)
    }

    fn inherited(self) -> bool {
        self.table().spread == Spread::Parent
    }

    /// Whether updates and deletes of it are carried.
    pub fn identified(self) -> bool {
        self.table().full || !matches!(self.table().key, Key::None | Key::Deferrable)
    }

    /// Whether its identity may become FULL and its key's again.
    pub fn changes_identity(self) -> bool {
        let table = self.table();
        table.spread == Spread::Plain
            && !table.full
            && !table.generated
            && !matches!(table.key, Key::None | Key::Deferrable | Key::Index)
    }

    pub fn has_unique(self) -> bool {
        self.table().unique.is_some() && !self.partitioned()
    }

    pub fn has_span(self) -> bool {
        self.table().exclusion && !self.partitioned()
    }

    /// The table that this one refers to, which is itself or an earlier one.
    pub fn reference(self) -> Option<Self> {
        let (to, _) = self.table().reference?;
        let to = Self { at: usize::from(to) % (self.at + 1), ..self };
        (to.table().key == Key::Int).then_some(to)
    }

    /// Names of the further columns, quoted, with their types and texts.
    pub fn columns(self) -> Vec<(String, &'static str, &'static [&'static str])> {
        let named = self.table().columns.iter().enumerate();
        named
            .map(|(at, &column)| {
                let (type_name, texts) = TYPES[column];
                let name = match at {
                    1 => format!(r#""C.{at} ""q"" \""#),
                    2 => "\"ORDER\"".to_owned(),
                    _ => format!("c{at}"),
                };
                (name, type_name, texts)
            })
            .collect()
    }

    pub fn create(self, version: u16) -> String {
        let table = self.table();
        let name = self.name();
        let mut parts = Vec::new();
        if table.dropped_column {
            parts.push("gone int".to_owned());
        }
        let key = table.key.type_name();
        match table.key {
            Key::Two => parts.push("k int, k2 int, primary key (k2, k)".to_owned()),
            Key::Index => parts.push(format!("k {key} not null, unique (k)")),
            Key::Deferrable => parts.push(format!("k {key} primary key deferrable initially deferred")),
            Key::None => parts.push(format!("k {key}")),
            _ => parts.push(format!("k {key} primary key")),
        }
        parts.push("n int, big text".to_owned());
        for (column, type_name, _) in self.columns() {
            parts.push(format!("{column} {type_name}"));
        }
        if self.has_unique() {
            let deferrable = if table.unique == Some(true) { " deferrable initially deferred" } else { "" };
            parts.push(format!("u int unique{deferrable}"));
        }
        if let Some(to) = self.reference() {
            let (_, how) = table.reference.unwrap_or_default();
            let action =
                ["", " on delete cascade on update cascade", " on delete set null", " deferrable initially deferred"];
            // An action would update or delete rows that nothing identifies.
            let how = if self.identified() { usize::from(how) % action.len() } else { 0 };
            parts.push(format!("ref int references {}{}", to.name(), action[how]));
        }
        if self.has_span() {
            parts.push("span int4range, exclude using gist (span with &&)".to_owned());
        }
        if table.generated {
            parts.push("g int generated always as (n * 2) stored, check (n < 1000000)".to_owned());
            if version >= 18 && table.key != Key::None && !table.full {
                parts.push("v text generated always as (upper(big)) virtual".to_owned());
            }
        }
        match table.identity {
            0 if !self.partitioned() => parts.push("i int generated always as identity".to_owned()),
            1 if !self.partitioned() => parts.push("i int generated by default as identity (increment -3)".to_owned()),
            2 => parts.push("i bigserial".to_owned()),
            _ => {}
        }
        let spread = match table.spread {
            Spread::Range | Spread::Nested if self.partitioned() => " partition by range (k)",
            Spread::Hash if self.partitioned() => " partition by hash (k)",
            _ => "",
        };
        let mut sql = format!("create table {name} ({}){spread};\n", parts.join(", "));
        sql += &self.parts_of(&name);
        if !self.partitioned() {
            sql += &format!("alter table {name} alter big set storage external;\n");
        }
        if table.dropped_column {
            sql += &format!("alter table {name} drop gone, add late int default 5;\n");
        }
        sql += &self.identity_sql(&name);
        sql += &self.triggers(&name);
        sql
    }

    fn parts_of(self, name: &str) -> String {
        let at = self.at;
        if self.inherited() {
            return format!("create table child{at} (extra text) inherits ({name});\n");
        }
        if !self.partitioned() {
            return String::new();
        }
        match self.table().spread {
            Spread::Hash => format!(
                "create table p{at}_0 partition of {name} for values with (modulus 2, remainder 0);
                 create table p{at}_1 partition of {name} for values with (modulus 2, remainder 1);\n"
            ),
            Spread::Nested => format!(
                "create table p{at}_0 partition of {name} for values from (minvalue) to (5) partition by range (k);
                 create table p{at}_00 partition of p{at}_0 for values from (minvalue) to (2);
                 create table p{at}_01 partition of p{at}_0 for values from (2) to (5);
                 create table p{at}_1 partition of {name} for values from (5) to (maxvalue);\n"
            ),
            _ => format!(
                "create table p{at}_0 partition of {name} for values from (minvalue) to (7);
                 create table p{at}_1 partition of {name} default;\n"
            ),
        }
    }

    fn identity_sql(self, name: &str) -> String {
        let table = self.table();
        let mut sql = String::new();
        if table.full {
            let all = "select relid::regclass from pg_partition_tree('NAME') union select inhrelid::regclass from pg_inherits where inhparent = 'NAME'::regclass
                       union select 'NAME'::regclass";
            let all = all.replace("NAME", &name.replace('\'', "''"));
            sql += &format!(
                "do $do$ declare r regclass; begin for r in {all} loop execute format('alter table %s replica identity full', r); end loop; end $do$;\n"
            );
        } else if table.key == Key::Index {
            sql += &format!(
                "do $do$ begin execute format('alter table %s replica identity using index %I', '{0}'::regclass,
                     (select relname from pg_index join pg_class on pg_class.oid = indexrelid
                       where indrelid = '{0}'::regclass and indkey::text = (select attnum::text from pg_attribute where attrelid = indrelid and attname = 'k'))); end $do$;\n",
                name.replace('\'', "''")
            );
        }
        // Children by inheritance have no key of their own.
        if self.inherited() && !table.full && self.identified() {
            sql += &format!("alter table child{} replica identity full;\n", self.at);
        }
        sql
    }

    fn triggers(self, name: &str) -> String {
        match self.table().trigger {
            0 => format!("create trigger touched before insert or update on {name} for each row execute function touch();\n"),
            1 => format!(
                "create trigger told after insert or update or delete on {name} for each row execute function tell('always');
                 alter table {name} enable always trigger told;\n"
            ),
            2 => format!(
                "create trigger silent after insert or update or delete on {name} for each row execute function never();
                 alter table {name} enable replica trigger silent;\n"
            ),
            3 if !self.partitioned() => {
                format!("create rule echo as on delete to {name} do also insert into witness (what) values ('rule');\n")
            }
            _ => String::new(),
        }
    }
}
