use super::*;
use proptest::prelude::*;

fn parse(text: &str) -> ConnInfo {
    ConnInfo::parse(text, &Ambient { user: Some("os".into()), home: Some("/home/os".into()), passfile: None }).unwrap()
}

fn refusal(text: &str) -> String {
    text.parse::<ConnInfo>().unwrap_err().to_string()
}

#[test]
fn both_forms_say_the_same() {
    let url = parse("postgresql://al%40ice:s%2Fe%3Ac@db.example:6432/shop%20eu?sslmode=require&connect_timeout=7");
    let words = parse(
        r"host=db.example port = 6432 user=al@ice password='s/e:c' dbname='shop eu' sslmode=require connect_timeout=7",
    );
    assert_eq!(url, words);
    assert_eq!(url.password().unwrap().expose(), "s/e:c");
    assert_eq!(url.connect_timeout(), Some(Duration::from_secs(7)));
}

#[test]
fn what_is_left_out_has_the_defaults_of_libpq() {
    let conninfo = parse("postgresql://");
    assert_eq!((conninfo.user(), conninfo.database()), ("os", "os"));
    assert_eq!(conninfo.hosts().len(), 1);
    assert_eq!(conninfo.hosts()[0].port, 5432);
    assert_eq!(conninfo.passfile(), Some(Path::new("/home/os/.pgpass")));
    assert_eq!(conninfo.ssl().mode, SslMode::Prefer);
    assert_eq!(parse("user=bob").database(), "bob");
    assert_eq!(conninfo.connect_timeout(), Some(Duration::from_secs(10)));
    assert_eq!(parse("connect_timeout=0").connect_timeout(), None);
    assert_eq!(parse("connect_timeout=1").connect_timeout(), Some(Duration::from_secs(2)));
}

#[test]
fn hosts_are_a_list_with_ports_addresses_and_sockets() {
    let conninfo = parse("postgresql://u@a:1,[::1]:2,%2Frun%2Fpg,b/db");
    let hosts: Vec<String> = conninfo.hosts().iter().map(ToString::to_string).collect();
    assert_eq!(hosts, ["a:1", "[::1]:2", "/run/pg:5432", "b:5432"]);
    assert!(conninfo.hosts()[2].is_unix());

    let conninfo = parse("host=a,b hostaddr=10.0.0.1,::1 port=7");
    assert_eq!(conninfo.hosts()[1].numeric, Some("::1".parse().unwrap()));
    assert_eq!(conninfo.hosts()[1].port, 7);
    assert_eq!(parse("hostaddr=10.0.0.1").hosts()[0].name(), "10.0.0.1");

    assert!(refusal("user=u host=a,b port=1,2,3").contains("3 ports do not go with 2 hosts"));
    assert!(refusal("user=u host=a,b hostaddr=10.0.0.1").contains("2 hosts do not go with 1 hostaddr"));
    assert!(refusal("postgresql://u@[::1/db").contains("] of an IPv6 address is missing"));
}

#[test]
fn quotes_and_backslashes_read_as_in_libpq() {
    let conninfo = parse(r"user='a b' password = 'it\'s \\ fine' dbname=with\ space");
    assert_eq!(conninfo.user(), "a b");
    assert_eq!(conninfo.password().unwrap().expose(), r"it's \ fine");
    assert_eq!(conninfo.database(), "with space");
    assert_eq!(parse("user=u password=''").password(), None);
    assert!(refusal("user='a").contains("quoted value of user does not end"));
}

#[test]
fn the_options_of_a_provider_arrive_as_written() {
    let conninfo = parse("postgresql://u@h/d?options=endpoint%3Dep-cool-1%20-c%20work_mem%3D64MB");
    assert_eq!(conninfo.options(), Some("endpoint=ep-cool-1 -c work_mem=64MB"));
    assert_eq!(parse("postgresql://u@h/d?options=endpoint=ep-1").options(), Some("endpoint=ep-1"));
}

#[test]
fn a_keyword_is_acted_on_or_refused_by_name() {
    assert!(refusal("user=u sslmod=require").contains("\"sslmode\""));
    assert!(refusal("postgresql://u@h/d?applicaton_name=x").contains("\"application_name\""));
    assert!(refusal("service=prod").contains("service files are not read"));
    assert!(refusal("user=u sslpassword=x").contains("sslpassword"));
    assert!(refusal("user=u require_auth=md5").contains("require_auth"));
    assert!(refusal("user=u sslmode=on").contains("disable, allow, prefer, require, verify-ca, verify-full"));
    assert!(refusal("user=u sslrootcert=system sslmode=require").contains("verify-full"));
    assert!(refusal("user=u sslnegotiation=direct").contains("sslmode=require"));
    assert!(refusal("user=u gssencmode=require").contains("GSSAPI"));
    assert_eq!(parse("sslrootcert=system").ssl().mode, SslMode::VerifyFull);
    assert_eq!(parse("postgresql://h/d?ssl=true").ssl().mode, SslMode::Require);
    parse("application_name=x fallback_application_name=y client_encoding=LATIN1 krbsrvname=k gssencmode=prefer");
}

#[test]
fn the_url_for_people_hides_the_password() {
    let conninfo = parse("postgresql://u:tOpS3cret@h:1/d?sslmode=verify-full&sslrootcert=%2Fca.pem");
    assert_eq!(conninfo.redacted(), "postgresql://u:***@h:1/d?sslmode=verify-full&sslrootcert=%2Fca.pem");
    assert!(!format!("{conninfo:?} {conninfo:#?} {conninfo}").contains("tOpS3cret"));
}

#[test]
fn a_slip_in_writing_the_password_does_not_show_it() {
    for text in [
        "postgresql://u:tOpS3cret@part-tOpS3cret@h/d",
        "postgresql://u:tOpS3cret/tOpS3cret@h/d",
        "postgresql://u:x/tOpS3cret?tOpS3cret=tOpS3cret@h/d",
        "postgresql://u:x?tOpS3cret/=tOpS3cret@h/d",
        "postgresql://u:tOpS3cret%zz@h/d",
        "postgresql://u@h/d?password=tOpS3cret&tOpS3cret=1",
        "postgresql://u@h/d?password=a&tOpS3cret",
        "user=u password=my tOpS3cret",
        "user=u password=my tOpS3cret=1",
        "user=u password='tOpS3cret",
        "mysql://u:tOpS3cret@h/d",
        "tOpS3cret",
        "user=u password=a sslmode=tOpS3cret",
        "user=u password=a port=tOpS3cret",
    ] {
        assert!(!refusal(text).contains("tOpS3cret"), "{text}: {}", refusal(text));
    }
}

/// Anything that a value may hold.
fn value() -> impl Strategy<Value = String> {
    "[^\0]{1,12}"
}

proptest! {
    #[test]
    fn any_text_is_a_connection_string_or_an_error(text: String) {
        drop(text.parse::<ConnInfo>());
        drop(format!("postgresql://{text}").parse::<ConnInfo>());
        drop(format!("host={text} user={text}").parse::<ConnInfo>());
    }

    #[test]
    fn what_is_printed_is_read_back(
        user in value(), password in value(), database in value(), options in value(),
        host in "[a-z0-9.-]{1,20}", port in 1u16.., mode in prop::sample::select(SslMode_ALL.to_vec()),
        timeout in 0u32..1000,
    ) {
        let words = format!(
            "host={host} port={port} user={} password={} dbname={} options={} sslmode={mode} connect_timeout={timeout}",
            quoted(&user), quoted(&password), quoted(&database), quoted(&options),
        );
        let conninfo: ConnInfo = words.parse().unwrap();
        prop_assert_eq!(conninfo.user(), user);
        prop_assert_eq!(conninfo.password().map(Password::expose), Some(password.as_str()));
        prop_assert_eq!(&conninfo.url_with_password().parse::<ConnInfo>().unwrap(), &conninfo);
    }

    #[test]
    fn a_password_never_shows(secret in "[!-~]{0,4}QXZ[!-~]{0,4}", shape in 0usize..5) {
        let text = match shape {
            0 => format!("postgresql://u:{secret}@h/d"),
            1 => format!("postgresql://u:{}@h/d", syntax::percent_encode(&secret)),
            2 => format!("postgresql://u@h/d?password={secret}"),
            3 => format!("host=h user=u password={secret} dbname=d"),
            _ => format!("host=h user=u password='{secret}' dbname=d"),
        };
        let said = match text.parse::<ConnInfo>() {
            Ok(conninfo) => format!("{conninfo} {conninfo:?}"),
            Err(error) => format!("{error} {error:?}"),
        };
        prop_assert!(!said.contains("QXZ"), "{}", said);
    }
}

#[expect(non_upper_case_globals, reason = "named after the type whose words these are")]
const SslMode_ALL: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', r"\\").replace('\'', r"\'"))
}
