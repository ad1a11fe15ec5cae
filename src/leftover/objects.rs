//! Large objects: content, owner, grants and comment, under the same identifiers.
//!
//! They are compared in ranges of identifiers and read in pieces, so that neither a great many of them nor a great one
//! needs much memory. An object is summed up on each side by its size and a digest of the digests of its pieces; of one
//! that differs, the pieces that differ travel. Pieces of zeroes that the target has nothing in the place of are not sent,
//! so a hole stays a hole.
//!
//! What the move made on the target is written down with it, in the same transaction: nothing else is ever overwritten or
//! removed.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::Mutex;

use super::{Carried, Context, Exactly};
use crate::error::{Class, Doing, Error, Result};
use crate::postgres::{Session, quote_identifier, quote_literal};
use crate::state::{Store, only_the_leader};

/// What is read and written in one go, in bytes: a multiple of what the server keeps together.
const PIECE: i32 = 1 << 20;
/// Pieces that are compared in one question.
const WINDOW: i64 = 1024;
/// Objects of a range.
const RANGE: i64 = 100;

/// INV_READ, and INV_READ | INV_WRITE.
const READ: i32 = 0x0004_0000;
const WRITE: i32 = 0x0006_0000;

/// The last identifier of each range.
const BOUNDS: &str = "
    SELECT oid FROM (SELECT oid, row_number() OVER (ORDER BY oid) AS at FROM pg_catalog.pg_largeobject_metadata) o
    WHERE at % $1 = 0 ORDER BY 1";

/// Of `m` (pg_largeobject_metadata): privilege, with grant option or not, and to whom. One without grants of its own has those
/// that its owner has by default.
const GRANTS: &str = r"
    ARRAY(SELECT a.privilege_type || E'\t' || CASE WHEN a.is_grantable THEN 't' ELSE 'f' END || E'\t'
                 || COALESCE(r.rolname::text, '')
          FROM pg_catalog.aclexplode(COALESCE(m.lomacl, pg_catalog.acldefault('L', m.lomowner))) a
          LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
          ORDER BY 1)";

/// `$1`, `$2`: a range of identifiers. What each object is. The size is asked for in one subquery that reads nothing but the
/// identifier: of two, the server would remember the second one's answer by the descriptor, which is the same each time.
fn described() -> String {
    format!(
        r"
        SELECT m.oid, size.bytes,
               COALESCE((SELECT pg_catalog.md5(string_agg(pg_catalog.md5(pg_catalog.lo_get(m.oid, at, {PIECE})), '' ORDER BY at))
                         FROM pg_catalog.generate_series(0::int8, size.bytes - 1, {PIECE}) at), ''),
               pg_catalog.pg_get_userbyid(m.lomowner)::text,
               {GRANTS},
               pg_catalog.obj_description(m.oid, 'pg_largeobject')
        FROM pg_catalog.pg_largeobject_metadata m
        CROSS JOIN LATERAL (
            SELECT pg_catalog.lo_lseek64(fd, 0, 2) AS bytes, pg_catalog.lo_close(fd) AS closed
            FROM (SELECT pg_catalog.lo_open(m.oid, {READ}) AS fd OFFSET 0) open OFFSET 0) size
        WHERE m.oid > $1 AND m.oid <= $2 AND size.closed = 0"
    )
}

/// `$1` an object, `$2` from, `$3` to: digests of its pieces.
fn pieces() -> String {
    format!(
        "SELECT at, pg_catalog.md5(pg_catalog.lo_get($1, at, {PIECE}))
         FROM pg_catalog.generate_series($2::int8, $3::int8 - 1, {PIECE}) at ORDER BY 1"
    )
}

/// One large object, as one side has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Object {
    bytes: i64,
    digest: String,
    owner: String,
    grants: BTreeSet<String>,
    comment: Option<String>,
}

impl Object {
    /// In what they are not the same.
    fn difference(&self, other: &Self) -> &'static str {
        match () {
            () if self.bytes != other.bytes => "its size",
            () if self.digest != other.digest => "its content",
            () if self.owner != other.owner => "its owner",
            () if self.grants != other.grants => "its grants",
            () => "its comment",
        }
    }
}

/// Whether the source has any, or the target one that the source may have removed since.
pub(super) async fn any(source: &Session, store: &Store) -> Result<bool> {
    let there: bool = source
        .query_one("SELECT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)", &[])
        .await
        .doing(|| "looking for large objects")?
        .try_get(0)?;
    Ok(there || store.has_large_objects().await?)
}

/// The connections, a pair for each range at a time.
pub(super) struct Objects {
    pairs: Mutex<Vec<(Session, Session)>>,
    at_once: usize,
}

impl Objects {
    pub(super) async fn connect(context: &Context<'_>, at_once: usize) -> Result<Self> {
        let mut pairs = Vec::new();
        for _ in 0..at_once {
            let pair = tokio::try_join!(context.source.connect("carry"), context.target.connect("carry"))?;
            for side in [&pair.0, &pair.1] {
                if let Err(error) = side.batch_execute(super::NOTICE_OUR_END).await {
                    tracing::debug!(%error, "the server would not notice our end");
                }
            }
            pairs.push(pair);
        }
        Ok(Self { pairs: Mutex::new(pairs), at_once })
    }

    /// Brings those of the target to what the source shows.
    pub(super) async fn carry(&self, context: &Context<'_>, exactly: Exactly) -> Result<Carried> {
        self.carry_all(context, exactly).await.doing(|| "carrying large objects")
    }

    async fn carry_all(&self, context: &Context<'_>, exactly: Exactly) -> Result<Carried> {
        let ranges = {
            let pair = self.take().await?;
            let rows = pair.0.query(BOUNDS, &[&RANGE]).await.doing(|| "listing the large objects")?;
            self.pairs.lock().await.push(pair);
            let mut bounds = vec![0];
            for row in &rows {
                bounds.push(row.try_get::<_, u32>(0)?);
            }
            bounds.push(u32::MAX);
            bounds.windows(2).map(|pair| (pair[0], pair[1])).collect::<Vec<_>>()
        };
        let carried: Vec<Carried> = stream::iter(ranges)
            .map(|range| async move {
                let pair = self.take().await?;
                let carried = Range { context, source: &pair.0, target: &pair.1 }.carry(range, exactly).await?;
                self.pairs.lock().await.push(pair);
                Ok::<_, Error>(carried)
            })
            .buffer_unordered(self.at_once)
            .try_collect()
            .await?;
        let mut all = Carried::default();
        carried.into_iter().for_each(|carried| all += carried);
        Ok(all)
    }

    async fn take(&self) -> Result<(Session, Session)> {
        self.pairs.lock().await.pop().ok_or_else(|| Error::bug("more ranges at once than connections"))
    }
}

/// One range on its way.
struct Range<'a> {
    context: &'a Context<'a>,
    source: &'a Session,
    target: &'a Session,
}

impl Range<'_> {
    async fn carry(&self, range: (u32, u32), exactly: Exactly) -> Result<Carried> {
        let limits = exactly.limits();
        let (read, write) =
            (format!("{limits}; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"), format!("{limits}; BEGIN"));
        tokio::try_join!(self.source.batch_execute(&read), self.target.batch_execute(&write))?;
        let made = self.made(range).await?;
        let (ours, theirs) =
            tokio::try_join!(async { describe(self.source, range).await.doing(|| "on the source") }, async {
                describe(self.target, range).await.doing(|| "on the target")
            })?;
        let mut carried = Carried::default();
        for (oid, object) in &ours {
            match theirs.get(oid) {
                Some(_) if !made.contains(oid) => return Err(taken(*oid)),
                Some(there) if there == object => {}
                there => {
                    carried.objects += 1;
                    carried.bytes +=
                        self.bring(*oid, object, there).await.doing(|| format!("carrying the large object {oid}"))?;
                }
            }
        }
        for oid in made.iter().filter(|oid| !ours.contains_key(oid)) {
            self.remove(*oid, theirs.contains_key(oid)).await.doing(|| format!("removing the large object {oid}"))?;
            carried.objects += 1;
        }
        if carried.objects > 0 {
            let now = describe(self.target, range).await?;
            let differs = ours.iter().find(|(oid, object)| now.get(oid) != Some(*object));
            if let Some((oid, object)) = differs {
                let what = now.get(oid).map_or("it is not there", |there| object.difference(there));
                let message =
                    format!("the large object {oid} is not the same on the target after it was brought there: {what}");
                return Err(Error::new(Class::No, "leftover_differs", message).hint(
                    "cut over again; if it stays: find out who writes to it, or set move.large_objects = false",
                ));
            }
        }
        let commit = format!("{}; COMMIT", self.context.guard());
        self.target.batch_execute(&commit).await.map_err(|error| only_the_leader(error.into()))?;
        self.source.batch_execute("COMMIT").await?;
        Ok(carried)
    }

    /// Those of the range that the move made.
    async fn made(&self, (from, to): (u32, u32)) -> Result<BTreeSet<u32>> {
        let rows = self
            .target
            .query(
                "SELECT loid FROM pgtandem.large_object WHERE move = $1 AND loid > $2 AND loid <= $3",
                &[&self.context.store.name().as_str(), &from, &to],
            )
            .await
            .doing(|| "asking for the large objects of the move")?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    /// Makes one object of the target what `wanted` says; returns the bytes that travelled.
    async fn bring(&self, oid: u32, wanted: &Object, there: Option<&Object>) -> Result<u64> {
        let created;
        let there = if let Some(there) = there {
            there
        } else {
            let name = quote_literal(self.context.store.name().as_str());
            self.target
                .batch_execute(&format!(
                    "SELECT pg_catalog.lo_create({oid});
                     INSERT INTO pgtandem.large_object (move, loid) VALUES ({name}, {oid}) ON CONFLICT DO NOTHING"
                ))
                .await?;
            created = describe(self.target, (oid - 1, oid)).await?.remove(&oid);
            created.as_ref().ok_or_else(|| Error::bug("a large object was made and is not there"))?
        };
        let same = (there.bytes, &there.digest) == (wanted.bytes, &wanted.digest);
        let bytes = if same { 0 } else { self.content(oid, wanted.bytes, there.bytes).await? };
        if there.owner != wanted.owner {
            let owner = quote_identifier(&wanted.owner);
            self.target.batch_execute(&format!("ALTER LARGE OBJECT {oid} OWNER TO {owner}")).await?;
        }
        // Its grants went over to the new owner.
        self.grants(oid, wanted).await?;
        if there.comment != wanted.comment {
            let comment = wanted.comment.as_deref().map_or_else(|| "NULL".to_owned(), quote_literal);
            self.target.batch_execute(&format!("COMMENT ON LARGE OBJECT {oid} IS {comment}")).await?;
        }
        Ok(bytes)
    }

    async fn content(&self, oid: u32, wanted: i64, there: i64) -> Result<u64> {
        let zeroes: String = self
            .source
            .query_one(
                &format!("SELECT pg_catalog.md5(pg_catalog.decode(pg_catalog.repeat('00', {PIECE}), 'hex'))"),
                &[],
            )
            .await?
            .try_get(0)?;
        let mut sent = 0;
        let mut from = 0;
        while from < wanted {
            let to = wanted.min(from + WINDOW * i64::from(PIECE));
            let (ours, theirs) =
                tokio::try_join!(digests(self.source, oid, from, to), digests(self.target, oid, from, to.min(there)))?;
            for (at, digest) in &ours {
                let hole = *at >= there && *digest == zeroes;
                if hole || theirs.get(at) == Some(digest) {
                    continue;
                }
                let piece: Vec<u8> = self
                    .source
                    .query_one("SELECT pg_catalog.lo_get($1, $2, $3)", &[&oid, at, &PIECE])
                    .await?
                    .try_get(0)?;
                self.target.execute("SELECT pg_catalog.lo_put($1, $2, $3)", &[&oid, at, &piece]).await?;
                sent += piece.len() as u64;
            }
            from = to;
        }
        // Cuts off what is too much, or makes the hole at the end.
        self.target
            .batch_execute(&format!(
                "SELECT pg_catalog.lo_truncate64(fd, {wanted}), pg_catalog.lo_close(fd)
                 FROM (SELECT pg_catalog.lo_open({oid}, {WRITE}) AS fd OFFSET 0) open"
            ))
            .await?;
        Ok(sent)
    }

    async fn grants(&self, oid: u32, wanted: &Object) -> Result<()> {
        let sql = format!("SELECT {GRANTS} FROM pg_catalog.pg_largeobject_metadata m WHERE m.oid = $1");
        let there: Vec<String> = self.target.query_one(&sql, &[&oid]).await?.try_get(0)?;
        let there: BTreeSet<String> = there.into_iter().collect();
        let revoke = there.difference(&wanted.grants).map(|grant| statement("REVOKE", oid, grant));
        let grant = wanted.grants.difference(&there).map(|grant| statement("GRANT", oid, grant));
        let statements = revoke.chain(grant).collect::<Vec<_>>();
        if statements.is_empty() { Ok(()) } else { Ok(self.target.batch_execute(&statements.join("; ")).await?) }
    }

    async fn remove(&self, oid: u32, there: bool) -> Result<()> {
        let name = quote_literal(self.context.store.name().as_str());
        let unlink = if there { format!("SELECT pg_catalog.lo_unlink({oid}); ") } else { String::new() };
        let forget = format!("DELETE FROM pgtandem.large_object WHERE move = {name} AND loid = {oid}");
        Ok(self.target.batch_execute(&format!("{unlink}{forget}")).await?)
    }
}

async fn describe(session: &Session, (from, to): (u32, u32)) -> Result<BTreeMap<u32, Object>> {
    let rows = session.query(&described(), &[&from, &to]).await.doing(|| "reading large objects")?;
    rows.iter()
        .map(|row| {
            let object = Object {
                bytes: row.try_get(1)?,
                digest: row.try_get(2)?,
                owner: row.try_get(3)?,
                grants: row.try_get::<_, Vec<String>>(4)?.into_iter().collect(),
                comment: row.try_get(5)?,
            };
            Ok((row.try_get(0)?, object))
        })
        .collect()
}

async fn digests(session: &Session, oid: u32, from: i64, to: i64) -> Result<BTreeMap<i64, String>> {
    let rows = session.query(&pieces(), &[&oid, &from, &to]).await.doing(|| "comparing the pieces")?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// A grant reads `SELECT<tab>f<tab>role`: privilege, with grant option or not, and to whom; nobody means everybody.
fn statement(verb: &str, oid: u32, grant: &str) -> String {
    let mut parts = grant.splitn(3, '\t');
    let (privilege, grantable, role) =
        (parts.next().unwrap_or_default(), parts.next() == Some("t"), parts.next().unwrap_or_default());
    let whom = if role.is_empty() { "PUBLIC".to_owned() } else { quote_identifier(role) };
    match (verb, grantable) {
        ("GRANT", true) => format!("GRANT {privilege} ON LARGE OBJECT {oid} TO {whom} WITH GRANT OPTION"),
        ("GRANT", false) => format!("GRANT {privilege} ON LARGE OBJECT {oid} TO {whom}"),
        _ => format!("REVOKE {privilege} ON LARGE OBJECT {oid} FROM {whom}"),
    }
}

fn taken(oid: u32) -> Error {
    Error::new(
        Class::No,
        "large_object_taken",
        format!("the target has a large object {oid} that this move did not make, and so has the source"),
    )
    .hint(format!("if nobody needs it: SELECT lo_unlink({oid}) on the target; or set move.large_objects = false"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_is_given_and_taken_by_its_words() {
        assert_eq!(statement("GRANT", 7, "SELECT\tf\tA b"), r#"GRANT SELECT ON LARGE OBJECT 7 TO "A b""#);
        assert_eq!(statement("GRANT", 7, "UPDATE\tt\tx"), r#"GRANT UPDATE ON LARGE OBJECT 7 TO "x" WITH GRANT OPTION"#);
        assert_eq!(statement("REVOKE", 7, "SELECT\tt\t"), "REVOKE SELECT ON LARGE OBJECT 7 FROM PUBLIC");
    }
}
