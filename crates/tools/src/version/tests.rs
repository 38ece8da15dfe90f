use proptest::prelude::*;

use super::*;

fn offered(texts: &[&str]) -> Vec<Version> {
    texts.iter().map(|text| Version::parse(text).unwrap()).collect()
}

fn picked(asked: &str, texts: &[&str]) -> Option<String> {
    let wanted = Wanted::parse(asked).unwrap();
    wanted.pick(&offered(texts), None).map(|version| version.text.clone())
}

#[test]
fn newest_that_fits_is_taken() {
    let all = &["18.2.0", "20.1.0", "20.10.0", "20.9.9", "22.0.0-rc.1", "21.3.1", "22.0.0-nightly"];
    for (asked, got) in [
        ("latest", "21.3.1"),
        ("*", "21.3.1"),
        ("20", "20.10.0"),
        ("20.x", "20.10.0"),
        ("20.*", "20.10.0"),
        ("v20", "20.10.0"),
        ("20.9", "20.9.9"),
        ("20.1.0", "20.1.0"),
        ("22.0.0-rc.1", "22.0.0-rc.1"),
        ("^20.1", "20.10.0"),
        ("~20.9.1", "20.9.9"),
        ("~20", "20.10.0"),
        (">=18, <20.10", "20.9.9"),
        (">= 18 < 20.10", "20.9.9"),
        (">20", "21.3.1"),
        ("<=20.9", "20.9.9"),
        ("<20", "18.2.0"),
        ("=18", "18.2.0"),
        ("==20.1.0", "20.1.0"),
        ("~=20.9", "20.10.0"),
        ("~=20.9.1", "20.9.9"),
        ("^17 || ^18", "18.2.0"),
        ("x", "21.3.1"),
    ] {
        assert_eq!(picked(asked, all).as_deref(), Some(got), "{asked}");
    }
    for asked in ["19", "22", "20.1.1", ">=22", "22.0.0-rc.2", "20.1.0-rc.1"] {
        assert_eq!(picked(asked, all), None, "{asked}");
    }
}

#[test]
fn caret_holds_the_first_number_that_is_not_0() {
    let all = &["0.2.3", "0.2.9", "0.3.0", "0.0.4", "0.0.3", "1.0.0"];
    for (asked, got) in [("^0.2.3", "0.2.9"), ("^0.0.3", "0.0.3"), ("^0", "0.3.0"), ("^1", "1.0.0")]
    {
        assert_eq!(picked(asked, all).as_deref(), Some(got), "{asked}");
    }
}

#[test]
fn latest_is_what_the_source_says() {
    let all = offered(&["1.0.0", "2.0.0", "0.0.17-gabc"]);
    let pick = |latest| Wanted::Latest.pick(&all, latest).unwrap().text.clone();
    assert_eq!(pick(Some("1.0.0")), "1.0.0");
    assert_eq!(pick(Some("0.0.17-gabc")), "0.0.17-gabc");
    assert_eq!(pick(Some("9.9.9")), "2.0.0", "one that is not offered says nothing");
    assert_eq!(pick(None), "2.0.0");
}

#[test]
fn what_is_not_there_gives_the_closest_by_number() {
    let all = offered(&["1.21.13", "1.22.10", "1.23.1", "1.23.2", "1.23.3.1", "1.24.3", "1.25rc1"]);
    let nearest = |asked: &str| Wanted::parse(asked).unwrap().nearest(&all, 3);
    assert_eq!(nearest("1.23.0"), ["1.23.1", "1.23.2", "1.23.3.1"]);
    assert_eq!(nearest("2"), ["1.24.3", "1.23.3.1", "1.23.2"], "by the first number, then newest");
    assert_eq!(nearest(">=1.25"), ["1.24.3", "1.23.3.1", "1.23.2"]);
    assert_eq!(nearest("latest"), ["1.24.3", "1.23.3.1", "1.23.2"]);
    assert!(Wanted::parse("1").unwrap().nearest(&[], 3).is_empty());
}

#[test]
fn packagers_own_numbers_belong_to_the_version() {
    assert_eq!(picked("1.23.4", &["1.23.4.4", "1.23.5"]).as_deref(), Some("1.23.4.4"));
    assert_eq!(picked("1.23", &["1.23.4.4", "1.23.3.9"]).as_deref(), Some("1.23.4.4"));
}

#[test]
fn debian_versions_are_shown_as_their_upstream() {
    for (id, text, pre) in [
        ("1:2.39.5-0+deb12u3", "2.39.5", false),
        ("1.96.0+dfsg1-1~deb12u2", "1.96.0", false),
        ("3.11.2-1+b1", "3.11.2", false),
        ("1.6-2.1+deb12u3", "1.6", false),
        ("3.0pl1-162", "3.0pl1", false),
        ("1:9.2p1-2+deb12u5", "9.2p1", false),
        ("2025b-0+deb12u2", "2025b", false),
        ("2.0~rc1-1", "2.0", true),
    ] {
        let version = Version::parse_debian(id).unwrap();
        assert_eq!((version.text.as_str(), version.is_pre()), (text, pre), "{id}");
    }
    let older = Version::parse_debian("1.6-2.1+deb12u2").unwrap();
    let newer = Version::parse_debian("1.6-2.1+deb12u10").unwrap();
    assert!(older.order(&newer).is_lt());
}

#[test]
fn pre_releases_are_told_from_releases() {
    for text in ["1.0rc1", "1.0a1", "1.0.dev3", "1.0-beta.2", "1.0-0", "2.0.0-canary.1+x", "1.0b2"]
    {
        assert!(Version::parse(text).unwrap().is_pre(), "{text}");
    }
    for text in ["1.0", "1.0.post1", "1.0+build.5", "20.13.0.post1", "v1"] {
        assert!(!Version::parse(text).unwrap().is_pre(), "{text}");
    }
}

#[test]
fn what_is_no_version_is_refused() {
    for text in ["", "next", "abc", ">", ">= >= 1", "^^1", "~>1", "1 ||", ",", "latest, 1", ">=x1"]
    {
        assert!(Wanted::parse(text).is_err(), "{text:?}");
    }
    assert!(Version::parse("canary").is_none());
    assert!(Version::parse("99999999999999999999999").is_none());
}

fn version() -> impl Strategy<Value = String> {
    (0u64..30, 0u64..30, 0u64..30, prop::option::of("rc[0-9]|-beta\\.[0-9]"))
        .prop_map(|(a, b, c, pre)| format!("{a}.{b}.{c}{}", pre.unwrap_or_default()))
}

fn asked() -> impl Strategy<Value = String> {
    let plain = prop_oneof![
        (0u64..30).prop_map(|a| a.to_string()),
        (0u64..30, 0u64..30).prop_map(|(a, b)| format!("{a}.{b}")),
        (0u64..30, 0u64..30, 0u64..30).prop_map(|(a, b, c)| format!("{a}.{b}.{c}")),
    ];
    let one = (prop::sample::select(vec!["", "^", "~", ">=", ">", "<", "<=", "="]), plain)
        .prop_map(|(operator, version)| format!("{operator}{version}"));
    prop_oneof![one.clone(), (one.clone(), one).prop_map(|(a, b)| format!("{a}, {b}"))]
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "[0-9a-zA-Z.+~^<>=*|, -]{0,64}") {
        let _ = Version::parse(&text);
        let _ = Version::parse_debian(&text);
        if let Ok(wanted) = Wanted::parse(&text) {
            wanted.nearest(&offered(&["1.0.0"]), 3);
        }
    }

    #[test]
    fn picked_one_fits_and_no_newer_one_does(
        asked in asked(),
        texts in prop::collection::vec(version(), 0..20),
    ) {
        let wanted = Wanted::parse(&asked).unwrap();
        let all: Vec<_> = texts.iter().map(|text| Version::parse(text).unwrap()).collect();
        match wanted.pick(&all, None) {
            Some(got) => {
                prop_assert!(wanted.accepts(got));
                let newer = all.iter().find(|other| wanted.accepts(other) && other.order(got).is_gt());
                prop_assert!(newer.is_none() || wanted.is_exactly(got));
            }
            None => prop_assert!(!all.iter().any(|version| wanted.accepts(version))),
        }
    }

    #[test]
    fn exact_version_is_found_wherever_it_is(texts in prop::collection::vec(version(), 1..20)) {
        let all: Vec<_> = texts.iter().map(|text| Version::parse(text).unwrap()).collect();
        for text in &texts {
            let wanted = Wanted::parse(text).unwrap();
            prop_assert_eq!(&wanted.pick(&all, None).unwrap().text, text);
        }
    }

    #[test]
    fn order_is_total(a in version(), b in version(), c in version()) {
        let [a, b, c] = [a, b, c].map(|text| Version::parse(&text).unwrap());
        prop_assert_eq!(a.order(&b), b.order(&a).reverse());
        if a.order(&b).is_le() && b.order(&c).is_le() {
            prop_assert!(a.order(&c).is_le());
        }
    }

    #[test]
    fn nearest_are_of_what_is_offered(asked in asked(), texts in prop::collection::vec(version(), 0..20)) {
        let all: Vec<_> = texts.iter().map(|text| Version::parse(text).unwrap()).collect();
        let nearest = Wanted::parse(&asked).unwrap().nearest(&all, 5);
        prop_assert!(nearest.len() <= 5);
        prop_assert!(nearest.iter().all(|text| texts.contains(text)));
        prop_assert!(texts.is_empty() || !nearest.is_empty());
    }
}
