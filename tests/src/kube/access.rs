//! Who may ask the API server for what, and how they prove it: kubeconfigs, certificates, tokens of service accounts.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, ensure};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    ControlPlane,
    client::{Request, TOKEN},
};
use crate::topology::SWITCH;

const NAMESPACE: &str = "kube-system";

/// Signs certificates of clients and of API servers.
#[derive(Debug)]
pub(super) struct Authority {
    dir: PathBuf,
}

/// What openssl has to know of an authority.
const CONFIG: &str = "[ca]\ndefault_ca = own\n\
    [own]\ndatabase = index.txt\nserial = serial\nnew_certs_dir = .\ndefault_md = sha256\npolicy = any\nunique_subject = no\n\
    [any]\norganizationName = optional\ncommonName = supplied\n";

impl Authority {
    /// One with a certificate of its own, and the keys that tokens of service accounts are signed with.
    pub(super) fn new(dir: &Path) -> anyhow::Result<Self> {
        let own = Self {
            dir: dir.to_owned(),
        };
        own.openssl(&[
            "ecparam",
            "-genkey",
            "-noout",
            "-name",
            "prime256v1",
            "-out",
            "sa.key",
        ])?;
        own.openssl(&["ec", "-pubout", "-in", "sa.key", "-out", "sa.pub"])?;
        own.make_key("ca")?;
        own.openssl(&[
            "req",
            "-x509",
            "-new",
            "-key",
            "ca.key",
            "-out",
            "ca.crt",
            "-subj",
            "/CN=tests",
            "-days",
            "2",
        ])?;
        for (file, text) in [("ca.cnf", CONFIG), ("index.txt", ""), ("serial", "01")] {
            fs::write(dir.join(file), text)?;
        }
        Ok(own)
    }

    /// A key, and a certificate that is valid from `from` to `to`: their files.
    fn issue(
        &self,
        name: &str,
        subject: &str,
        extensions: &str,
        from: Timestamp,
        to: Timestamp,
    ) -> anyhow::Result<[PathBuf; 2]> {
        self.make_key(name)?;
        let file = |end: &str| format!("{name}.{end}");
        let (key, request, extra, certificate) =
            (file("key"), file("csr"), file("ext"), file("crt"));
        self.openssl(&[
            "req", "-new", "-key", &key, "-out", &request, "-subj", subject,
        ])?;
        fs::write(self.dir.join(&extra), extensions)?;
        let time = |time: Timestamp| time.strftime("%Y%m%d%H%M%SZ").to_string();
        self.openssl(&[
            "ca",
            "-batch",
            "-notext",
            "-config",
            "ca.cnf",
            "-cert",
            "ca.crt",
            "-keyfile",
            "ca.key",
            "-in",
            &request,
            "-out",
            &certificate,
            "-extfile",
            &extra,
            "-startdate",
            &time(from),
            "-enddate",
            &time(to),
        ])?;
        Ok([key, certificate].map(|file| self.dir.join(file)))
    }

    fn make_key(&self, name: &str) -> anyhow::Result<()> {
        let file = format!("{name}.key");
        self.openssl(&[
            "genpkey",
            "-algorithm",
            "EC",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-out",
            &file,
        ])
    }

    fn openssl(&self, args: &[&str]) -> anyhow::Result<()> {
        let output = Command::new("openssl")
            .args(args)
            .current_dir(&self.dir)
            .output();
        let output = output.context("cannot run openssl")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "openssl {args:?}: {said}");
        Ok(())
    }
}

/// How a client knows the API server.
#[derive(Clone, Copy, Debug)]
pub enum Server {
    /// By nothing: any will do.
    Any,
    /// By its certificate, or one that the tests' authority has signed.
    Own,
    /// By what another cluster has.
    Another,
}

impl ControlPlane {
    /// Writes a kubeconfig for a component with all rights.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn kubeconfig(&self) -> anyhow::Result<PathBuf> {
        self.kubeconfig_of(TOKEN)
    }

    /// Writes a kubeconfig for who has this token: [`super::KUBE_PROXY`], [`super::NOBODY`].
    ///
    /// # Errors
    /// It cannot be written.
    pub fn kubeconfig_of(&self, token: &str) -> anyhow::Result<PathBuf> {
        self.kubeconfig_for(token, &json!({"token": token}), Server::Any)
    }

    /// The same for an API server that is reached at this address, and has to prove who it is.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn kubeconfig_at(&self, token: &str, server: &str) -> anyhow::Result<PathBuf> {
        let cluster = json!({
            "server": server,
            "certificate-authority": self.dir.join("certs/apiserver.crt"),
            "tls-server-name": "kubernetes.default.svc",
        });
        self.write_kubeconfig(token, &cluster, &json!({"token": token}))
    }

    /// Writes a kubeconfig called `name` for who proves by `user` who they are.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn kubeconfig_for(
        &self,
        name: &str,
        user: &Value,
        server: Server,
    ) -> anyhow::Result<PathBuf> {
        let mut cluster = json!({"server": self.client.server});
        match server {
            Server::Any => cluster["insecure-skip-tls-verify"] = true.into(),
            Server::Own => {
                let trusted = ["certs/apiserver.crt", "ca.crt"]
                    .map(|file| fs::read_to_string(self.dir.join(file)));
                let [own, authority] = trusted;
                let path = self.dir.join("trusted.crt");
                fs::write(&path, own? + &authority?)?;
                cluster["certificate-authority"] = json!(path);
            }
            Server::Another => cluster["certificate-authority"] = json!(self.dir.join("ca.crt")),
        }
        self.write_kubeconfig(name, &cluster, user)
    }

    fn write_kubeconfig(
        &self,
        name: &str,
        cluster: &Value,
        user: &Value,
    ) -> anyhow::Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        });
        let path = self.dir.join(format!("kubeconfig-{name}"));
        fs::write(&path, config.to_string())?;
        Ok(path)
    }

    /// A certificate of a client, by which it is `user`, as a kubeconfig has it; valid now, or an hour ago.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn client_certificate(&self, user: &str, is_expired: bool) -> anyhow::Result<Value> {
        let now = Timestamp::now();
        let hour = Duration::from_secs(3600);
        let (name, from, to) = match is_expired {
            true => ("expired", now - 2 * hour, now - hour),
            false => ("client", now - hour, now + hour),
        };
        let extensions = "extendedKeyUsage = clientAuth\n";
        let subject = format!("/CN={user}");
        let [key, certificate] = self.authority.issue(name, &subject, extensions, from, to)?;
        Ok(json!({"client-certificate": certificate, "client-key": key}))
    }

    /// Arguments of an API server that looks as if the clock of its clients were an hour behind: its certificate is not valid
    /// before.
    ///
    /// # Errors
    /// The certificate cannot be made.
    pub fn early_certificate(&self) -> anyhow::Result<[String; 2]> {
        let from = Timestamp::now() + Duration::from_secs(3600);
        let to = from + Duration::from_secs(3600);
        let extensions = format!("subjectAltName = IP:{SWITCH}, DNS:kubernetes.default.svc\n");
        let issued = self
            .authority
            .issue("early", "/CN=early", &extensions, from, to)?;
        let [key, certificate] = issued.map(|file| file.display().to_string());
        Ok([
            format!("--tls-cert-file={certificate}"),
            format!("--tls-private-key-file={key}"),
        ])
    }

    /// A folder as a pod of `system:node-proxier` has it mounted: the authority of the API server, its namespace and a token.
    /// The token is good as long as there is a Secret of this name.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn service_account(&self, secret: &str) -> anyhow::Result<PathBuf> {
        let account = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/proxy");
        let object = |kind: &str, name: &str| json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}});
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "proxy"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
            "subjects": [{"kind": "ServiceAccount", "name": "proxy", "namespace": NAMESPACE}],
        });
        self.client.send(&[
            Request::apply(&account, object("ServiceAccount", "proxy")),
            Request::apply(&bindings("proxy"), binding),
            Request::apply(&secret_path(secret), object("Secret", secret)),
        ])?;
        let bound = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "expirationSeconds": 3600,
                "boundObjectRef": {"apiVersion": "v1", "kind": "Secret", "name": secret},
            },
        });
        let request = Request::create(&format!("{account}/token"), bound);
        let answer: Value = serde_json::from_str(&self.client.send(&[request])?)?;
        let token = answer["status"]["token"].as_str().context("no token")?;
        let folder = self.dir.join("serviceaccount");
        fs::create_dir_all(&folder)?;
        fs::copy(self.dir.join("certs/apiserver.crt"), folder.join("ca.crt"))?;
        fs::write(folder.join("namespace"), NAMESPACE)?;
        fs::write(folder.join("token"), token)?;
        Ok(folder)
    }

    /// The tokens that are bound to this Secret are good for nothing from now on.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn delete_secret(&self, secret: &str) -> anyhow::Result<()> {
        self.client
            .send(&[Request::delete(&secret_path(secret))])
            .map(drop)
    }

    /// Grants `user` the right to list and watch these resources, and no others: `(group, resource)`.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn grant(&self, user: &str, resources: &[(&str, &str)]) -> anyhow::Result<()> {
        let rule = |(group, resource): &(&str, &str)| json!({"apiGroups": [group], "resources": [resource], "verbs": ["list", "watch"]});
        let group = "rbac.authorization.k8s.io";
        let object = |kind: &str| json!({"apiVersion": format!("{group}/v1"), "kind": kind, "metadata": {"name": user}});
        let mut role = object("ClusterRole");
        role["rules"] = resources.iter().map(rule).collect();
        let mut binding = object("ClusterRoleBinding");
        binding["roleRef"] = json!({"apiGroup": group, "kind": "ClusterRole", "name": user});
        binding["subjects"] = json!([{"apiGroup": group, "kind": "User", "name": user}]);
        let role_path = format!("/apis/{group}/v1/clusterroles/{user}");
        self.client
            .send(&[
                Request::apply(&role_path, role),
                Request::apply(&bindings(user), binding),
            ])
            .map(drop)
    }
}

fn bindings(name: &str) -> String {
    format!("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/{name}")
}

fn secret_path(name: &str) -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/secrets/{name}")
}
