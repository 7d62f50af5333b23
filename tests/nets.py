"Models of many kinds, each with what makes a batch of its inputs."
from functools import partial

import pytest
import torch
import torchvision.models as tv
from fastai.basics import nn
from fastai.collab import EmbeddingNN
from fastai.tabular.all import TabularModel
from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config, get_language_model, get_text_classifier
from fastai.text.models.awdlstm import EmbeddingDropout, WeightDropout
from fastai.vision.all import DynamicUnet, create_body, xresnet18
from torch.utils.checkpoint import checkpoint

BS = 6
def images(size=64): return torch.randn(BS, 3, size, size),
def tokens(n=9): return torch.randint(2, 40, (BS, n)),
def vectors(n=8): return torch.randn(BS, n),

def classifier(arch, **kwargs): return arch(weights=None, num_classes=4, **kwargs)

class Encoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first,self.emb,self.head = batch_first,nn.Embedding(40, 16),nn.Linear(16, 3)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0., batch_first=batch_first), 3,
            enable_nested_tensor=False)
    def forward(self, x): return self.head(self.layers(self.emb(x if self.batch_first else x.T)).mean(int(self.batch_first)))

class Recurrent(nn.Module):
    "What it says depends on the outputs and on the hidden state"
    def __init__(self, cls):
        super().__init__()
        self.emb,self.rnn,self.head = nn.Embedding(40, 16),cls(16, 12, 2),nn.Linear(24, 3)
    def forward(self, x):
        out,h = self.rnn(self.emb(x).transpose(0, 1))
        return self.head(torch.cat([out.mean(0), (h[0] if isinstance(h, tuple) else h)[0]], 1))

class Packed(Recurrent):
    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(self.emb(x), torch.arange(len(x))+2, batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0].transpose(0, 1).flatten(1))

class AsDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(8, 8),nn.Linear(8, 8)
    def forward(self, x): return dict(twice=[self.a(x), self.b(x)], mask=x[:,0] > -9, n=3)

class DictNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.block,self.head = AsDict(),nn.Linear(8, 3)
    def forward(self, x):
        o = self.block(x)
        return self.head((o['twice'][0]*o['twice'][1]).where(o['mask'][:,None], 0)/o['n'])

class Twins(nn.Module):
    "One encoder called twice, each on half of the input"
    def __init__(self):
        super().__init__()
        self.encoder,self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)),nn.Linear(10, 3)
    def forward(self, x): return self.head(torch.cat([self.encoder(x[:,:4]), self.encoder(x[:,4:]).relu_()], 1))

class Tied(nn.Module):
    "One activation and one layer that come again and again, in place, and the output tied to the embedding"
    def __init__(self):
        super().__init__()
        self.emb,self.a,self.again,self.act,self.out = nn.Embedding(40, 8),nn.Linear(8, 8),nn.Linear(8,
            8),nn.ReLU(inplace=True),nn.Linear(8, 40)
        self.out.weight = self.emb.weight
    def forward(self, x):
        x = self.act(self.a(self.emb(x)))
        for _ in range(2): x = self.act(self.again(x)).add_(x)
        return self.out(x)

class Checkpointed(nn.Sequential):
    on = True
    def forward(self, x):
        for block in self[:-1]: x = checkpoint(block, x, use_reentrant=False) if self.on and self.training else block(x)
        return self[-1](x)

class Seq2Seq(nn.Module):
    "Its decoder reads the tokens one step late, shifted as BART and T5 do it"
    def __init__(self):
        super().__init__()
        self.encode,self.decode = nn.Embedding(40, 8),nn.Embedding(40, 8)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    def forward(self, x):
        late = x.new_zeros(x.shape)
        late[:,1:] = x[:,:-1].clone()
        late[:,0] = 2
        return self.head(torch.cat([self.encode(x).mean(1), self.decode(late).mean(1)], 1))

class InPlace(nn.Sequential):
    "Writes into what each block returns"
    def forward(self, x):
        for block in self: x = block(x).mul_(2).add_(1)
        return x

class AsksGradient(nn.Module):
    "Wants the gradient of its input in training, as Wav2Vec2 does"
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Sequential(*blocks()),nn.Linear(8, 3)
    def forward(self, x):
        x = x[:,None]
        if self.training: x.requires_grad = True
        return self.head(self.body(x)[:,0])

class OneHot(nn.Sequential):
    def forward(self, x): return super().forward(nn.functional.one_hot(x, 40).float().flatten(1))

def blocks(): return [nn.Sequential(nn.Linear(8, 8), nn.Dropout(.3), nn.ReLU(inplace=True), nn.Linear(8, 8)) for _ in range(3)]
def frozen(model):
    for p in list(model.parameters())[:-2]: p.requires_grad_(False)
    return model
def text_classifier():
    return get_text_classifier(AWD_LSTM, 40, 3, seq_len=8, config={**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 10, 'n_layers': 2})
def ragged():
    x, = tokens(20)
    for i,n in (2, 8), (3, 8), (5, 16): x[i,:n] = 1
    return x[[0, 1, 4, 2, 3, 5]],
def language_model(): return get_language_model(AWD_LSTM, 40, config={**awd_lstm_lm_config, 'emb_sz': 8, 'n_hid': 10, 'n_layers': 2})
def timm_model(name, **kwargs): return pytest.importorskip('timm').create_model(name, num_classes=4, **kwargs)

NETS = dict(
    resnet18=(partial(classifier, tv.resnet18), images), xresnet18=(partial(xresnet18, n_out=4), images),
    densenet121=(partial(classifier, tv.densenet121), images),
    vit_b_16=(partial(classifier, tv.vit_b_16, image_size=32), partial(images, 32)),
    convnext_tiny=(partial(classifier, tv.convnext_tiny), images),
    efficientnet_b0=(partial(classifier, tv.efficientnet_b0), images),
    googlenet=(partial(classifier, tv.googlenet, aux_logits=True, init_weights=False), images),
    deeplab=(partial(tv.segmentation.deeplabv3_mobilenet_v3_large, weights=None, weights_backbone=None, num_classes=4, aux_loss=True),
    images),
    unet=(lambda: DynamicUnet(create_body(tv.resnet18(), pretrained=False), 3, (32, 32)), partial(images, 32)),
    timm_vit=(partial(timm_model, 'vit_tiny_patch16_224', img_size=64), images),
    timm_swin=(partial(timm_model, 'swin_tiny_patch4_window7_224', img_size=64, window_size=2, embed_dim=16, depths=(2, 2, 2, 2),
    num_heads=(1, 2, 2, 2)), images),
    timm_mixer=(partial(timm_model, 'mixer_s32_224'), partial(images, 224)), timm_convnext=(partial(timm_model, 'convnext_atto'), images),
    table=(lambda: TabularModel([(40, 4), (40, 3)], 8, 2, [20, 10]), lambda: (*tokens(2), *vectors())),
    table_cat=(lambda: TabularModel([(40, 4), (40, 3)], 0, 2, [20, 10]), lambda: (*tokens(2), torch.empty(BS, 0))),
    collab_nn=(lambda: EmbeddingNN([(40, 5), (40, 4)], [20]), partial(tokens, 2)),
    awd_lstm=(text_classifier, ragged), awd_lstm_short=(text_classifier, partial(tokens, 7)), language=(language_model, tokens),
    encoder=(partial(Encoder, True), tokens), encoder_steps_first=(partial(Encoder, False), tokens),
    gru=(partial(Recurrent, nn.GRU), tokens), lstm=(partial(Recurrent, nn.LSTM), tokens), packed=(partial(Packed, nn.LSTM), tokens),
    seq2seq=(Seq2Seq, tokens), one_hot=(lambda: OneHot(nn.Linear(360, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)),
    tokens),
    in_place=(lambda: InPlace(*blocks(), nn.Linear(8, 3)), vectors), dicts=(DictNet, vectors), asks_gradient=(AsksGradient, vectors),
    twins=(Twins, vectors), tied=(Tied, tokens), checkpointed=(lambda: Checkpointed(*blocks(), nn.Linear(8, 3)), vectors),
    frozen=(lambda: frozen(classifier(tv.resnet18)), images),
    frozen_table=(lambda: frozen(TabularModel([(40, 4)], 8, 2, [20, 10])), lambda: (*tokens(1), *vectors())))

def steady(model):
    "Training mode, in which batch norm and dropout do nothing that depends on other items or on chance"
    model.train()
    for m in model.modules():
        if not any(m.children()) or isinstance(m, (EmbeddingDropout, WeightDropout)): m.eval()
    return model

def build(name):
    torch.manual_seed(0)
    net,inputs = NETS[name]
    model,xb = net(),inputs()
    for p in model.parameters():
        if p.ndim > 1 and not p.any(): nn.init.normal_(p)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms: m.momentum = 1.
    if norms:
        with torch.no_grad(): model.train()(*xb)
    return model,xb,inputs()
